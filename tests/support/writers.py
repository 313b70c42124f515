"""
The whole of: DCP StorageWriters of somebody else's, for the sidecar's executor to import by name.

Called from: the tests of plugged-in writers (the executor finds this module through PYTHONPATH), and stock DCP in them.
Must never: know anything of Pillion but the name of the thread that it gives each rank (a writer that is not told its rank
has no other way to fail on a chosen one).
"""

import dataclasses
import enum
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

HOOKS: Final = (
    "__init__",
    "reset",
    "set_up_storage_writer",
    "prepare_local_plan",
    "prepare_global_plan",
    "write_data",
    "finish",
)
"""DCP's hooks in DCP's order; `prepare_global_plan` and `finish` are the coordinator's."""


class Refusal(Exception):
    """An error that no other process has the class of."""


class Script:
    """
    What a writer notes down, and where it fails.

    Args:
      log: folder; each rank appends the names of its hooks to a file of its own.
      faults: hook -> ranks on which it raises.
      error: class of what is raised.
      as_long_as: fails only while this file exists; None is always.
    """

    def __init__(
        self,
        log: str | None = None,
        faults: Mapping[str, Sequence[int]] | None = None,
        error: str = "ValueError",
        as_long_as: str | None = None,
    ) -> None:
        self._log = log
        self._faults = dict(faults or {})
        self._error = error
        self._as_long_as = as_long_as

    def enter(self, hook: str) -> None:
        rank = rank_of_thread()
        if self._log is not None:
            with (Path(self._log) / f"{rank}.hooks").open("a") as file:
                print(hook, os.getpid(), file=file)
        armed = self._as_long_as is None or os.path.exists(self._as_long_as)
        if rank in self._faults.get(hook, ()) and armed:
            kind: Any = {"Refusal": Refusal, "SystemExit": SystemExit, "OSError": OSError}.get(self._error, ValueError)
            raise kind(28, f"{hook} fails on {rank}") if kind is OSError else kind(f"{hook} fails on {rank}")


def rank_of_thread() -> int:
    """The rank that the executor names in its thread; 0 in stock DCP's own process."""
    name = threading.current_thread().name
    return int(name.removeprefix("pillion-rank-").partition("_")[0]) if name.startswith("pillion-rank-") else 0


def hooks_of(log: Path, rank: int) -> list[str]:
    """Return the hooks that a rank has noted, in their order."""
    return [line.split()[0] for line in (log / f"{rank}.hooks").read_text().splitlines()]


class Recorder(FileSystemWriter):
    """Stock files; every hook is noted down and may fail."""

    def __init__(self, path: str = "", **script: Any) -> None:
        super().__init__(path, sync_files=False)
        self._script = Script(**script)
        self._script.enter("__init__")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._script.enter("reset")
        super().reset(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._script.enter("set_up_storage_writer")
        assert kwargs == {"rank": rank_of_thread(), "use_collectives": True}
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._script.enter("prepare_local_plan")
        return super().prepare_local_plan(plan)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._script.enter("prepare_global_plan")
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self._script.enter("write_data")
        return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._script.enter("finish")
        super().finish(metadata, results)


class Kind(enum.Enum):
    """An enum of the writer's own module."""

    TENSORS = "tensors"


@dataclasses.dataclass(frozen=True)
class Place:
    """A dataclass of the writer's own module."""

    file: Path
    key: tuple[str, int]
    kind: Kind


class Bare(StorageWriter):
    """
    A format of its own, by a writer from before torch 2.9: its `set_up_storage_writer` takes no keyword arguments.

    One file of tensors a rank, and `index.json` with what `finish` was given.
    """

    def __init__(self, extra: object = None) -> None:
        self._path = Path()
        self._extra = extra

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is not None
        self._path = Path(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        self._path.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data={"pod": (os.getpid(), self._extra)})

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        assert all(isinstance(plan.storage_data["pod"], tuple) for plan in plans)
        return [
            dataclasses.replace(plan, storage_data=Place(Path(f"{i}.pt"), ("rank", i), Kind.TENSORS))
            for i, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        place = plan.storage_data
        assert isinstance(place, Place)
        resolved = [(item, planner.resolve_data(item)) for item in plan.items]
        tensors = {item.index.fqn: data.clone() for item, data in resolved if isinstance(data, torch.Tensor)}
        torch.save(tensors, self._path / place.file)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, 1, place) for item, _ in resolved])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index = {result.index.fqn: result.storage_data.key for each in results for result in each}
        assert index.keys() == metadata.state_dict_metadata.keys()
        (self._path / "index.json").write_text(json.dumps(index))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class Untyped(Bare):
    """Its write results are dictionaries, as those of torch's own TestStorageWriter are: DCP never looks into them."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[Any] = Future()
        future.set_result([{"success": True, "rank": rank_of_thread()}])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        (self._path / "results.json").write_text(json.dumps(results))


class Unsendable(Bare):
    """Hands an object of no known kind from plan to plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data={"pod": (threading.Lock(),)})


class Hanging(Bare):
    """Never comes back from `write_data` on rank 1."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if rank_of_thread() == 1:
            threading.Event().wait()
        return super().write_data(plan, planner)
