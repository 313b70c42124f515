"""The state of this sidecar for reports: counters, newest failures, requested saves. Pure; `reporting` sends it."""
