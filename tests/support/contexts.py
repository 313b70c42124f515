"""
The whole of: the context of an executor's session, for tests of one step of a save, a load or a rescue without its processes.

Called from: unit tests. Must never: open a store or a segment.
"""

from collections.abc import Sequence
from pathlib import Path

from pillion.wire import policy
from pillion_sidecar.executor.exchange import protocol
from pillion_sidecar.executor.exchange.watchdog import Watchdog
from pillion_sidecar.executor.session import Context
from pillion_sidecar.storage import opening
from pillion_sidecar.storage.local import LocalFolder
from support.deadlines import Deadline

SESSION = "a" * 32


def of_pod(
    root: Path | str,
    between: protocol.Exchange,
    *,
    pods: Sequence[tuple[int, ...]] = ((0,),),
    first_rank: int = 0,
    peer_timeout_s: float = Deadline.REPLY.s,
    persist_timeout_s: float = Deadline.REPLY.s,
) -> Context:
    """The session of the pod that `first_rank` is the first of, which meets the others in `between`."""
    of = policy.parse({}, embedded=True)
    (local_ranks,) = [ranks for ranks in pods if ranks[0] == first_rank]
    return Context(
        session=SESSION,
        run_id="test",
        world_size=sum(len(ranks) for ranks in pods),
        pods=tuple(pods),
        local_ranks=local_ranks,
        root=LocalFolder(str(root)) if str(root) else None,
        segments={},
        exchange=between,
        generation=1,
        retention=of.retention,
        restore=of.restore,
        opener=opening.Opener(),
        peer_timeout_s=peer_timeout_s,
        persist_timeout_s=persist_timeout_s,
        write_threads=1,
        watch=Watchdog(storage_timeout_s=Deadline.REPLY.s, store_timeout_s=Deadline.REPLY.s),
    )
