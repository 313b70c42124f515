"""The record of a session in the runtime directory, from which a restarted sidecar continues. The sessions themselves: `supervisor.sessions`."""
