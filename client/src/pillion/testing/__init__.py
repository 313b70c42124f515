"""Faults at named phases of a save, for tests of jobs and of Pillion itself. Nothing here runs unless PILLION_FAULTS is set."""
