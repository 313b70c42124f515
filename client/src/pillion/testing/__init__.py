"""What a test of a job, or of Pillion itself, can do to a save: faults at named phases. Nothing here runs unless it is asked for."""
