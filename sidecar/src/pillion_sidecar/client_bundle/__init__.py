"""The client library for trainers whose image lacks it: its installation into a volume, and the shim that chooses a version. No client code."""
