"""
The whole of: who the ranks of a session are, for tests that make a pod without trainers.

Called from: tests.
"""

from pathlib import Path

from pillion.wire.control import MeetingStore
from pillion_sidecar.arena.pod_arena import Identity


def identity(session: str, folder: Path, store: tuple[str, int] | None) -> Identity:
    """Rank 0 of two pods of a rank each that meet in `store`; None: it is alone. Its root lies in `folder`."""
    pods = ((0,),) if store is None else ((0,), (1,))
    return Identity(
        session=session,
        run_id="test",
        attempt=0,
        world_size=len(pods),
        pods=pods,
        local_ranks=(0,),
        root=str(folder / "runs"),
        store_mode=None if store is None else MeetingStore.PREFIX,
        store=store,
    )
