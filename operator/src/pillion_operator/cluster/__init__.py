"""
The API server as the operator's processes see it: requests, caches, a Lease, and events, all on plain JSON.

Called from: webhook, controller, home and certificates.
Must never: know what the objects mean; that is the business of whoever asks for them.
"""
