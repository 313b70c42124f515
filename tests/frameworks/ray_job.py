"""
The whole of: a TorchTrainer of Ray Train on one machine, with two workers that save and resume through Pillion.

Called from: `test_ray.py`, as a program: python ray_job.py FOLDER ROOT NAME KILL_AT FIRST_KILLED RAYS_OWN. The
ranks from FIRST_KILLED on die in the step KILL_AT. NAME is the folder of the run below FOLDER; a
second try of the workers writes into NAME-again. RAYS_OWN is a folder with a short name, for Ray's sockets.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

import ray
import ray.train
import ray.train.torch
import torch

from frameworks import interrupted, own_script
from frameworks.own_script import Parts

OBJECTS_BYTES: Final = 100 * 1024**2
"""Memory of Ray's object store, which holds nothing here."""


class Rank:
    """What the script asks a Peer for, in a worker of Ray."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()


def make(peer: Any, _: Path) -> Parts:
    net = own_script.net_of()
    model: Any = ray.train.torch.prepare_model(net) if isinstance(peer, Rank) else own_script.parallel(net, peer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Parts(model=model, optimizer=optimizer, loader=own_script.loader_of(peer))


def without(peer: Any, folder: Path) -> None:
    """The same script on ranks without Ray and without Pillion."""
    _run(peer, folder, None, -1)


def loop(config: dict[str, Any]) -> None:
    """What each worker runs, at each try."""
    peer = Rank()
    folder = Path(config["folder"]) / config["name"]
    again = (folder / f"losses.{peer.rank}").exists()
    folder = folder.with_name(f"{folder.name}-again") if again else folder
    dies = not again and peer.rank >= config["first_killed"]
    loaded = _run(peer, folder, Path(config["root"]), config["kill_at"] if dies else -1)
    (folder / f"loaded.{peer.rank}").write_text(json.dumps(loaded))
    ray.train.report({"step": interrupted.STEPS})


def _run(peer: Any, folder: Path, root: Path | None, kill_at: int) -> Any:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    return own_script.run(make, peer, folder, root, kill_at)


def main(folder: str, root: str, name: str, kill_at: str, first_killed: str, rays_own: str) -> None:
    """Run one TorchTrainer. Ray starts its workers again when they die, once."""
    variables = {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=OBJECTS_BYTES,
        runtime_env={"env_vars": variables},
        _temp_dir=rays_own,
    )
    trainer = ray.train.torch.TorchTrainer(
        loop,
        train_loop_config={
            "folder": folder,
            "root": root,
            "name": name,
            "kill_at": int(kill_at),
            "first_killed": int(first_killed),
        },
        scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
        run_config=ray.train.RunConfig(
            storage_path=rays_own, name=name, failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    )
    print("result", trainer.fit())
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
