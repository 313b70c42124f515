"""
What rests on storage, and how: the archive around each tensor, DCP's `.metadata`, digests, and the backends that hold
them.

Nothing here imports torch; what another torch wrote is read and what it will read is written byte by byte.
"""
