"""What happened here: counters, failures, requested saves. Pure."""
