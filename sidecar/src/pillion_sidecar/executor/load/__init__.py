"""One load in the executor, in the order of its steps: request, choose, restore (fill, or the snapshot as it lies), report."""
