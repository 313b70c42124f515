"""Reports of this sidecar to the controller, and its Prometheus endpoint. What they report is counted in `status`."""
