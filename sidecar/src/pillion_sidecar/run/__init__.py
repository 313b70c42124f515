"""The facts of a run over all of its attempts, and what they come to: stalls, lost work, goodput. Pure."""
