"""
One load in the executor: the modules request, choose, restore, fill, snapshot, matching and reshard.

The trainer's copy out of the slot is not here: it is in the client. Saves are in `executor.save`.
"""
