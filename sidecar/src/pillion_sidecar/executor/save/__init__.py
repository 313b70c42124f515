"""
One save in the executor: the steps of Pillion's own save (persist, write, commit), the path through a named `StorageWriter` (the modules dcp_*
and writer_class), the rescue, and the comparison of replicas.

The plan is not here: it is in `executor.plan`. Whether a checkpoint is committed is in `checkpoint`, loads are in `executor.load`.
"""
