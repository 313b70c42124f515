"""
The whole of: a plain torchrun job with a data loader, whose trainer the kernel kills.

Called from: pytest.
Must never: end a worker of the data loader; torchrun does not either.
"""

import json
import signal
from pathlib import Path

from process.ranks import Ranks, committed
from support import deadlines
from support.deadlines import Deadline
from support.processes import Processes

SCRIPT = """
import json, os, pathlib, sys, time
import torch
from torch.utils.data import DataLoader, Dataset
import pillion

root = pathlib.Path(sys.argv[1])
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

class Items(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if attempt == "0" and index > 3:
            (root / f"stuck.{os.getpid()}").touch()
            while not (root / "told").exists():  # a read that storage does not answer, for as long as the job goes on
                time.sleep(0.01)
            os._exit(0)
        return torch.tensor([float(index)])

state = {"w": torch.zeros(100)}
with pillion.Checkpointer(root) as checkpointer:
    start = checkpointer.load(state) or 0
    tier = checkpointer.last_load.tier
    for step, item in enumerate(DataLoader(Items(), batch_size=None, num_workers=2, multiprocessing_context="fork"), 1):
        if step <= start:
            continue
        state["w"] += item
        checkpointer.save(state, step).result(60)
(root / "told").write_text(json.dumps({"start": start, "tier": tier, "attempt": attempt, "w": float(state["w"][0])}))
"""


def test_a_job_whose_trainer_is_killed_beside_stuck_workers_resumes_in_its_one_restart(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Two workers hold what they inherited from the dead trainer; the next one is let in at once, resumes from memory, and ends well."""
    root = tmp_path / "runs"
    root.mkdir()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = processes.torchrun(script, root, num_ranks=1, max_restarts=1)
    deadlines.eventually(
        lambda: len(list(root.glob("stuck.*"))) == 2 and committed(root)[-1:] == [4],
        Deadline.TORCHRUN,
        "both workers are stuck, and step 4 is on storage",
    )
    run.signal_rank(0, signal.SIGKILL)
    run.check(Deadline.TORCHRUN)
    assert json.loads((root / "told").read_text()) == {"start": 4, "tier": "arena", "attempt": "1", "w": 28.0}
    ranks.alone()
