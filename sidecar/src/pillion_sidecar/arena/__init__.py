"""
The arena of one pod: its segment files, their memory, the table of slots and saves, and what a sealed slot holds.

No requests to other processes and no storage here. The byte layout is `pillion.wire.arena`.
"""
