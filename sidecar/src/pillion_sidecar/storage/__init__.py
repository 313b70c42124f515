"""
How checkpoints lie on storage: folders in a file system or a bucket, the archive around each tensor, DCP's `.metadata`, and digests.

No torch here: the package reads the files of other torch versions, and writes the files that they read, byte by byte. Whether a checkpoint is
committed is not here either: it is in `checkpoint`.
"""
