"""Segments (files of the arena) and the table of slots and saves."""
