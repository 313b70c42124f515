"""
The whole of: what one rank leaves on storage before its save is committed: a data file and a part file; and the claim of a root.

Called from: tests of the commit and of the retention.
"""

import uuid
from pathlib import Path

from pillion.wire import manifest, names
from pillion_sidecar.checkpoint import ownership
from pillion_sidecar.storage import archive, digest
from pillion_sidecar.storage.local import LocalFolder


def write_part(
    folder: Path, rank: int, *, world_size: int, generation: str = "1", plan_id: str = "p", step: int = 5
) -> None:
    """One rank's data file and part file, as a pod of one rank leaves them."""
    payload = bytes([rank]) * 64
    data = archive.head("uint8", (64,), 64) + payload + archive.tail("uint8", (64,), 64)
    file = names.data_file(rank, 0, generation)
    (folder / file).write_bytes(data)
    chunk = manifest.StoredChunk(
        "w", "uint8", (64 * world_size,), (64 * rank,), (64,), file, 0, len(data), digest.digest(data)
    )
    part = manifest.Part(
        step=step, generation=generation, run_id="r", world_size=world_size, plan_id=plan_id, ranks=(rank,),
        files={file: len(data)}, chunks=(chunk,), opaque=(), paths={"w": ("w",)},
    )  # fmt: skip
    (folder / names.part_file(rank, generation)).write_bytes(part.encode())


def begin_session(root: str) -> int:
    """Claim the root for a session that has ended when the next one claims it: its generation."""
    record = ownership.Record(session=uuid.uuid4().hex, name="a test", left=True)
    return ownership.claim(LocalFolder(root), record, silent_s=0.0)[0]
