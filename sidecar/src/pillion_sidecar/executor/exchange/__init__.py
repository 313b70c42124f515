"""
The exchange, by which the pods of a job agree: one protocol, three carriers (the job's TCPStore, storage, one pod alone) and a watchdog.

What the pods agree on is not here: it is in `executor.save` and `executor.load`.
"""
