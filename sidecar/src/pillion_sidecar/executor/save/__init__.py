"""One save in the executor, in the order of its steps: persist, plan, write, commit."""
