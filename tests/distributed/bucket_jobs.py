"""
The whole of: jobs of two pods that share nothing but a bucket: how they are told, and what has to hold of the bucket at the end.

Called from: test_store_faults.py, test_bucket_pods.py.
Must never: break anything by itself.
"""

from pathlib import Path
from typing import Any, Final

from torch.distributed import checkpoint as stock

from distributed.scene import BOUNDS, PODS, check_state, state_of
from process.ranks import Job
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.fault_proxy import FaultProxy

FOLDER: Final = "team/run"
STORAGE_TIMEOUT_S: Final = 20
"""PILLION_STORAGE_TIMEOUT_S here, on a quiet machine: more than the bound of one request for a document (15 s), as in production."""
PERSIST_TIMEOUT_S: Final = 60
"""PILLION_PERSIST_TIMEOUT_S here: more than the bound for storage and the pauses between the tries of a save."""


def variables(proxy: FaultProxy) -> dict[str, str]:
    """
    The environment of `scene.train`: the bucket by way of the proxy, and short bounds.
    """
    place = proxy.place
    scale = Deadline.REPLY.s / Deadline.REPLY.quiet_s
    bounds = BOUNDS | {
        "PILLION_STORAGE_TIMEOUT_S": str(STORAGE_TIMEOUT_S),
        "PILLION_PERSIST_TIMEOUT_S": str(PERSIST_TIMEOUT_S),
    }
    return {
        "MATRIX_ROOT": f"{place.url}/{FOLDER}",
        "AWS_ENDPOINT_URL": place.endpoint,
        **place.environment,
        **{name: str(round(int(value) * scale)) for name, value in bounds.items()},
    }


def ask(job: Job, command: str, step: int = 0) -> list[Any]:
    """
    What each rank answers to a command.
    """
    for trainer in job.trainers:
        trainer.say((command, step))
    return job.hear()


def save(job: Job, step: int) -> list[Any]:
    """
    What became of a save, on each rank: the step, or the error's text.
    """
    assert ask(job, "save", step) == ["trains on"] * len(job.trainers)
    return ask(job, "result", step)


def finish(job: Job) -> None:
    """
    Let the trainers end.
    """
    for trainer in job.trainers:
        trainer.say(("end", 0))
    job.finish(Deadline.DRAINED)


def check_bucket(proxy: FaultProxy, target: Path) -> None:
    """
    Whatever is committed is loaded by stock DCP, bit for bit; no upload is open.
    """
    place = proxy.place
    assert behind.unended_uploads(place) == []
    root = behind.download(place, FOLDER, target)
    committed = behind.committed(place, FOLDER)
    assert committed
    for step in committed:
        state = state_of(0, 0, named=-1) | state_of(0, 1, named=-1)
        stock.load(state, checkpoint_id=root / f"step-{step}", no_dist=True)
        for rank in range(len(PODS)):
            check_state(state, step, rank)
