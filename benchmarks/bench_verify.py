"""
`pillion verify` of a checkpoint beside a raw O_DIRECT read of the same file, and `pillion cp` beside a read and a write.

Called from: run.py.
"""

from __future__ import annotations

import shutil
import time

import floors
import measures

from pillion_sidecar.cli import copying, verifying
from pillion_sidecar.storage.local import LocalFolder


def measure(of: measures.Settings) -> list[measures.Line]:
    state_dict = measures.state(of.num_bytes, 64)
    memory = floors.shared_memory(of.num_bytes)
    verify: list[float] = []
    copy: list[float] = []
    with measures.scratch(of) as root:
        with measures.checkpointer(root / "run") as checkpointer:
            checkpointer.save(state_dict, 1).result(measures.SAVE_TIMEOUT_S)
        folder = LocalFolder(str(root / "run" / "step-1"))
        [file] = (root / "run" / "step-1").glob("*.distcp")
        for number in range(of.repeat):
            raw_s = floors.direct_read_s(file, memory)
            finding = verifying.verify(folder, 1, is_quiet=True)
            if finding.problems:
                raise RuntimeError(finding.problems[0])
            verify.append(raw_s / finding.seconds)
            started = time.monotonic()
            copying.copy(
                copying.read_source(folder, 1), LocalFolder(str(root / f"copy-{number}" / "step-1")), is_quiet=True
            )
            copy.append(raw_s / (time.monotonic() - started))
            shutil.rmtree(root / f"copy-{number}")
    return [
        measures.median_line("raw O_DIRECT read / pillion verify", verify, goal=0.95, sense=">="),
        measures.median_line(
            "raw O_DIRECT read / pillion cp to the same disk", copy, note="it writes as much as it reads"
        ),
    ]
