"""The client library, laid out for the trainer's image."""
