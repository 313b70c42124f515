"""
Calling home, the controller's side: who reports, whether it may, and what is known of each job.

Called from: the controller, while it is the active replica.
Must never: write to the cluster, or let one job speak for another.
"""
