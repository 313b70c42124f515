"""
A checkpoint on storage: whether it is committed, which session may commit, which checkpoint is the newest, and which ones retention removes.

No torch and no other pods here: the exchange between pods is in `executor.exchange`, reads and writes of bytes are in `storage`.
"""
