"""Background tasks, and calls that may block, each with a bound."""
