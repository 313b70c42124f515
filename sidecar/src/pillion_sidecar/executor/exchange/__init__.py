"""How the pods of a job agree: one protocol, three carriers (the job's TCPStore, storage, one pod alone) and a watchdog."""
