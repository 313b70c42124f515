"""
The whole of: torchrun restarts a job after a rank was killed, and the sidecar serves the new attempt.

Called from: pytest.
Must never: restart by hand; torchrun does it, on its own store.
"""

import json
import signal
import socket
from pathlib import Path

import pytest

from process.ranks import Ranks, committed
from support import deadlines
from support.deadlines import Deadline
from support.processes import Processes

SCRIPT = """
import json, os, pathlib, sys
import torch, torch.distributed as dist
import pillion

root, pods = pathlib.Path(sys.argv[1]), sys.argv[2]
# As examples/charlm/training.py join(): torchrun's store outlives a restart, with the addresses of the dead.
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
store, rank, world = next(dist.rendezvous("env://"))
dist.init_process_group("gloo", store=dist.PrefixStore(attempt, store), rank=rank, world_size=world)

def prefixes():
    keys = [key for key in store.list_keys() if "pillion/" in key]
    return sorted({"/".join(key.split("pillion/")[1].split("/")[:2]) for key in keys})

if pods == "two":
    os.environ["PILLION_POD"] = f"pod{rank}"
checkpointer = pillion.Checkpointer(root)
state = {"w": torch.zeros(500), "own": {f"r{rank}": torch.zeros(7)}}
start = checkpointer.load(state) or 0
assert torch.equal(state["w"], torch.full((500,), float(start))), (start, state["w"][0])
assert torch.equal(state["own"][f"r{rank}"], torch.full((7,), float(start + rank) if start else 0.0))
tier = checkpointer.last_load.tier
for step in range(start + 1, 5):
    now = {"w": torch.full((500,), float(step)), "own": {f"r{rank}": torch.full((7,), float(step + rank))}}
    checkpointer.save(now, step).result(60)
    dist.barrier()
    if step == 2 and attempt == "0":
        (root / f"ready{rank}").write_text(" ".join(prefixes()))
        dist.barrier()
        import signal
        signal.pause()
dist.barrier()
checkpointer.close()
told = {"rank": rank, "start": start, "tier": tier, "prefixes": prefixes()}
(root / f"told{rank}").write_text(json.dumps(told))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("rendezvous", "pods"), [("static", "one"), ("c10d", "two")])
def test_a_restarted_attempt_goes_on_saving_in_a_generation_of_its_own(
    processes: Processes, ranks: Ranks, tmp_path: Path, rendezvous: str, pods: str
) -> None:
    """SIGKILL of rank 1 under torchrun: both ranks resume the newest step from the arena, and what they save bears a new
    generation in its file names and, alone, a new prefix in the store."""
    root = tmp_path / "root"
    root.mkdir()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        # The static rendezvous takes no port 0; whoever takes this one before torchrun does fails the test, not us.
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"static": ["--master-addr=127.0.0.1", f"--master-port={port}"], "c10d": ["--standalone"]}[rendezvous]
    run = processes.python(
        "-m", "torch.distributed.run", *options, "--nproc-per-node=2", "--max-restarts=1", script, root, pods,
        env={"OMP_NUM_THREADS": "1", "PILLION_LINGER_S": "60"},
    )  # fmt: skip

    def ready() -> bool:
        if run.popen.poll() is not None:
            raise RuntimeError(run.tail())
        return (root / "ready0").exists() and (root / "ready1").exists()

    deadlines.eventually(ready, Deadline.SCRIPT, "both ranks have saved step 2")
    run.signal_rank(1, signal.SIGKILL)
    run.check(Deadline.TORCHRUN)
    told = [json.loads((root / f"told{rank}").read_text()) for rank in range(2)]
    assert [(each["start"], each["tier"]) for each in told] == [(2, "arena")] * 2
    assert committed(root) == [1, 2, 3, 4]
    generations = {
        step: {path.name.split(".")[1] for path in (root / f"step-{step}").glob("__*.distcp")} for step in (1, 2, 3, 4)
    }
    assert generations[1] == generations[2]
    assert generations[3] == generations[4]
    assert generations[1] != generations[3]
    if pods == "two":
        before = (root / "ready0").read_text().split()
        assert len(before) == len(told[0]["prefixes"]) == 1, "the first attempt's keys have left the store with it"
        assert before != told[0]["prefixes"]
