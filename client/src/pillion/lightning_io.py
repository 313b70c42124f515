"""
Lightning's checkpoint plugin: checkpoints of a `ModelCheckpoint` as directories that Pillion writes beside the training.

Called from: Lightning's strategies, on rank 0. `pillion.lightning` has the public name.
Must never: write the weights in the trainer.

Tensors are saved as tensors, those of the `state_dict` under their FQN. Everything else is one leaf, with a mark in place of each tensor.
"""

from __future__ import annotations

import collections
import io
import os
import shutil
from concurrent import futures
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from pillion import dcp, opaque
from pillion.errors import UsageError
from pillion.wire import names

_MARK: Final = "pillion.tensor"
"""Key of the dict that stands in place of a tensor: its value is the tensor's number."""


class PillionCheckpointIO(CheckpointIO):  # type: ignore[misc] # Lightning has no types here
    """
    Saves through `pillion.dcp.async_save`, so that `ModelCheckpoint` waits for the copy alone. A checkpoint is a directory.

    For the strategies that use a plugin: one device, and DDP. `ModelCheckpoint` lists directories to find and to remove checkpoints, which a
    trainer in a pod cannot: use `PillionCheckpoint` there.

    Raises:
        UsageError: this is a pod.
    """

    def __init__(self) -> None:
        if names.ENV_RUNTIME_DIR in os.environ:
            raise UsageError(
                "PillionCheckpointIO needs the storage in the trainer, where a pod has none: use the callback PillionCheckpoint instead"
            )
        self._saves: dict[str, futures.Future[Any]] = {}
        """Path -> its newest save."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """
        Copy the checkpoint into the arena, and return. The directory exists at once, so that links to it can be made.

        Blocks: as `pillion.dcp.async_save`.

        Raises:
            UsageError: there are storage options.
        """
        if storage_options is not None:
            raise UsageError(f"storage_options={storage_options!r}: Pillion has none, leave them out")
        where = os.path.abspath(path)
        if os.path.isfile(where) or os.path.islink(where):
            os.remove(where)
        os.makedirs(where, exist_ok=True)
        tensors: list[torch.Tensor] = []
        rest = {key: _marked(value, tensors) for key, value in checkpoint.items() if key != "state_dict"}
        state: dict[str, Any] = {"rest": opaque.pickled(rest, "rest")}
        if "state_dict" in checkpoint:
            state["state_dict"] = checkpoint["state_dict"]
        state["tensors"] = {str(index): tensor for index, tensor in enumerate(tensors)}
        self._saves[where] = dcp.async_save(state, checkpoint_id=where, no_dist=True)

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """
        Return the checkpoint in a directory, that of a `PillionCheckpoint` too: its weights, without what only that callback can restore.

        Args:
            map_location: None, or a device for the tensors. Without it they are on the CPU.
            weights_only: as for `torch.load`, for everything that is no tensor. None is False.

        Blocks: for a save to this path in flight, and for the read.

        Raises:
            CheckpointException: as `pillion.dcp.load`.
        """
        where = os.path.realpath(path)
        self._wait(where)
        metadata = FileSystemReader(where).read_metadata()
        flat: dict[str, Any] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                flat[fqn] = torch.empty(entry.size, dtype=entry.properties.dtype)
            elif fqn == "rest" or fqn.startswith("state_dict."):
                flat[fqn] = None
        dcp.load(flat, checkpoint_id=where, no_dist=True)
        if isinstance(map_location, (str, torch.device)):
            flat = {
                fqn: each.to(map_location) if isinstance(each, torch.Tensor) else each for fqn, each in flat.items()
            }
        weights = {fqn.partition(".")[2]: value for fqn, value in flat.items() if fqn.startswith("state_dict.")}
        if "rest" not in flat:
            return {"state_dict": weights}
        rest = torch.load(io.BytesIO(flat["rest"]), map_location="cpu", weights_only=bool(weights_only))
        return {**_unmarked(rest, flat), **({"state_dict": weights} if weights else {})}

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint. Blocks: for a save to it in flight."""
        where = os.path.abspath(path)
        self._wait(where)
        self._saves.pop(where, None)
        if os.path.islink(where):
            os.remove(where)
        elif Path(where).exists():
            shutil.rmtree(where)

    def teardown(self) -> None:
        """Wait for the saves in flight. Pillion's log, and the exit status, have what was lost."""
        futures.wait(self._saves.values())

    def _wait(self, where: str) -> None:
        saving = self._saves.get(where)
        if saving is not None:
            futures.wait([saving])


def _marked(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Return the value with a mark in place of each tensor in its dicts, lists and tuples. Appends the tensors."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {_MARK: len(tensors) - 1}
    if type(value) in (dict, collections.OrderedDict):
        return type(value)((key, _marked(each, tensors)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_marked(each, tensors) for each in value)
    return value


def _unmarked(value: Any, flat: dict[str, Any]) -> Any:
    """Return the value with its tensors again. `flat`: FQN -> tensor."""
    if type(value) is dict and value.keys() == {_MARK}:
        return flat[f"tensors.{value[_MARK]}"]
    if type(value) in (dict, collections.OrderedDict):
        return type(value)((key, _unmarked(each, flat)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(_unmarked(each, flat) for each in value)
    return value
