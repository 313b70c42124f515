"""
The API server as the operator's processes see it: requests, caches, a Lease, and events, all on plain JSON.

Called from: webhook, controller, home and certificates.
Must never: interpret the objects; that is the callers' part.
"""
