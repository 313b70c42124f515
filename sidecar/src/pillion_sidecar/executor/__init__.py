"""The executor: a child process that plans, writes, commits and loads. `parent` is the supervisor's end, `worker` the child."""
