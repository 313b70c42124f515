"""
The whole of: examples/fsdp2.py, plain FSDP2 with `app_state`: interrupted, it is the run that was never interrupted.

Called from: pytest.
Must never: change the script. Its losses and the digest of its weights are on its standard output.
"""

import contextlib
import importlib.util
import io
import re
import shutil
from pathlib import Path
from typing import Final

from process.ranks import Peer, Ranks, committed
from support.deadlines import Deadline
from support.logs import heard
from support.processes import Processes

SCRIPT: Final = Path(__file__).parents[2] / "examples" / "fsdp2.py"
STEPS: Final = 12
STORED: Final = 8
"""A step on storage, at the end of the second epoch."""
DIES: Final = 7
"""A step in the middle of the second epoch. The newest snapshot is of the step before."""


def losses(text: str) -> dict[int, str]:
    """Return step -> loss, as rank 0 printed it."""
    return {int(step): loss for step, loss in re.findall(r"^step (\d+): loss (\S+)$", text, flags=re.MULTILINE)}


def run(peer: Peer, root: Path) -> tuple[dict[int, str], str, list[str]]:
    """Train in a forked rank. Returns its losses, the digest of its weights, and what its log says of a resume."""
    spec = importlib.util.spec_from_file_location("fsdp2_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), heard() as lines:
        digest = example.train(str(root))
    return losses(printed.getvalue()), digest, [each for each in lines if "resumed" in each]


def test_a_run_under_fsdp2_that_is_killed_equals_one_that_was_not(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Two ranks on gloo: from memory, within an epoch, by torchrun's restart; and from storage. Each loss, and the weights, bit for bit."""
    (whole, weights, said), _ = ranks.start(lambda peer: run(peer, tmp_path / "whole"), num_ranks=2).finish()
    assert sorted(whole) == list(range(1, STEPS + 1))
    assert len(set(whole.values())) == STEPS
    assert said == []
    assert committed(tmp_path / "whole") == [STORED, STEPS]

    killed = processes.torchrun(
        SCRIPT, "--root", tmp_path / "killed", "--die-at", str(DIES),
        max_restarts=1, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    killed.check(Deadline.TORCHRUN)
    assert f"pillion: resumed from step {DIES - 1} (memory, " in killed.stderr
    assert losses(killed.stdout) == whole
    assert f"\ntrained up to step {STEPS}, weights {weights}\n" in killed.stdout

    shutil.copytree(tmp_path / "whole" / f"step-{STORED}", tmp_path / "again" / f"step-{STORED}")
    (again, at_end, said), _ = ranks.start(lambda peer: run(peer, tmp_path / "again"), num_ranks=2).finish()
    assert [line.startswith(f"pillion: resumed from step {STORED} (storage, ") for line in said] == [True]
    assert again == {step: loss for step, loss in whole.items() if step > STORED}
    assert at_end == weights
    ranks.alone()
