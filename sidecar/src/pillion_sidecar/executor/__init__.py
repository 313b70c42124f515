"""
The executor, the sidecar's child process: all code that may block on storage, on other pods or in torch. `worker` is its entry.

No connection to trainers: the supervisor talks to them, and sends this process requests.
"""
