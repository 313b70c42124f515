"""Who the ranks are, and what a successor of this sidecar needs to go on."""
