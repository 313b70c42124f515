"""
Certificates of the webhook and of the report endpoint: issued, trusted, written, and served, each in a module of its own.

Called from: webhook and controller, which both serve; the leader alone makes them (certificates.mode: Self).
Must never: serve a certificate before the API server trusts its signer, or write a private key anywhere but into a Secret.
"""
