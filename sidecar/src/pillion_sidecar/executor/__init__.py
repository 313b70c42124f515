"""The child process: everything that may block on storage, on other pods or in torch. `worker` is its entry."""
