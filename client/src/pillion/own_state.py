"""
Wrappers for state that does not fit a template of tensors: `Whole`, `PerRank` and `Rng`.

Called from: `pillion.state`, which has the public names, and the modules of frameworks. Each wrapper is a `Stateful` with one opaque leaf, so
its inner structure may change from save to save.
Must never: communicate, or draw a random number.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import os
import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist

from pillion import opaque

_log = logging.getLogger(__name__)

_RANK_KEY: Final = re.compile(r"rank\d+")

_only_names: contextvars.ContextVar[bool] = contextvars.ContextVar("only_names", default=False)
"""Whether `state_dict` is called for the template of a load. Then only the name of an opaque leaf counts."""


class Stateful(Protocol):
    """An object with a state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@contextlib.contextmanager
def only_names() -> Iterator[None]:
    """Within it, wrappers give an empty leaf instead of the inner state: a data loader would start its workers for that."""
    token = _only_names.set(True)
    try:
        yield
    finally:
        _only_names.reset(token)


def is_of_a_rank(value: object, below: str) -> bool:
    """Whether `below`, the part of an FQN below the key of `value`, is the leaf of one rank."""
    return isinstance(value, PerRank) and _RANK_KEY.fullmatch(below) is not None


class Whole:
    """
    A `Stateful` whose structure changes from save to save (a log that grows, progress of a loop), as one opaque leaf.

    Args:
        inner: the object. Its state is pickled as a whole, so tensors in it are not resharded.
    """

    def __init__(self, inner: Stateful) -> None:
        self.inner = inner

    def state_dict(self) -> dict[str, bytes]:
        return {"whole": b"" if _only_names.get() else opaque.pickled(self.inner.state_dict(), "whole")}

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        data = state_dict["whole"]
        if data:
            self.inner.load_state_dict(opaque.unpickled(data, "whole"))


class PerRank:
    """
    A `Stateful` of this rank alone (a data loader, a random generator), as one opaque leaf under a name of its own for each rank.

    It comes back to the same rank from memory and from storage. In a world of another size each rank gets the state of its own number. `gone`
    names the ranks whose state nobody has then, and a warning says so.

    Args:
        inner: the object. Its structure may change from save to save.
        process_group: the ranks that count; None is the default group (or a single process).
    """

    def __init__(self, inner: Stateful, *, process_group: dist.ProcessGroup | None = None) -> None:
        self.inner = inner
        self.gone: tuple[int, ...] = ()
        """Ranks whose state the last load did not bring back to anybody, or this rank if there was none for it."""
        self._group = process_group
        self._offered = b""

    def state_dict(self) -> dict[str, bytes]:
        rank, world = self._place()
        state = None if _only_names.get() else self.inner.state_dict()
        self._offered = opaque.pickled({"world": world, "state": state}, f"rank{rank}")
        return {f"rank{rank}": self._offered}

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        rank, world = self._place()
        data = state_dict[f"rank{rank}"]
        what = type(self.inner).__name__
        if data is self._offered:  # a load that found none for this rank leaves the value that was asked with
            self.gone = (rank,)
            _log.warning("pillion: the checkpoint has no %s of rank %d, which stays as it is here", what, rank)
            return
        loaded = opaque.unpickled(data, f"rank{rank}")
        assert isinstance(loaded, dict)
        before = int(loaded["world"])
        self.gone = tuple(range(world, before))
        if before != world and rank == 0:
            lost = f"; that of ranks {world} to {before - 1} is gone" if self.gone else ""
            _log.warning(
                "pillion: %s was saved by %d ranks, and there are %d now: each has the state of the rank of its number%s",
                what,
                before,
                world,
                lost,
            )
        self.inner.load_state_dict(loaded["state"])

    def _place(self) -> tuple[int, int]:
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(self._group), dist.get_world_size(self._group)
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Rng(PerRank):
    """
    The random generators of this rank: Python's, NumPy's, torch's, and that of its device.

    A load keeps what it read. `put_back` sets the generators, at the moment that makes the resumed run equal to one without a break: a
    data loader draws from torch's generator when its iterator is made, so in the middle of an epoch it is after that.
    """

    def __init__(self, *, process_group: dist.ProcessGroup | None = None) -> None:
        self._generators = _Generators()
        super().__init__(self._generators, process_group=process_group)

    @property
    def within_epoch(self) -> bool:
        """Whether the state that waits was saved in the middle of an epoch of `AppState.batches`."""
        return self._generators.held is not None and bool(self._generators.held["within_epoch"])

    def note_epoch(self, within: bool) -> None:
        """Note whether an iterator of the data loader is open, for the next save."""
        self._generators.within_epoch = within

    def put_back(self) -> bool:
        """
        Set the generators to what the last load read. Only the first call after a load does anything.

        Returns:
            Whether it did.
        """
        return self._generators.put_back()


class _Generators:
    """The state of all generators of this process."""

    def __init__(self) -> None:
        self.held: Mapping[str, Any] | None = None
        self.within_epoch = False

    def state_dict(self) -> dict[str, Any]:
        numpy = sys.modules.get("numpy")  # a process that has not imported it has drawn nothing from it
        device = _device_module()
        return {
            "python": random.getstate(),
            "numpy": None if numpy is None else numpy.random.get_state(),
            "torch": torch.get_rng_state(),
            "device": None if device is None else device.get_rng_state(),
            "within_epoch": self.within_epoch,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.held = state_dict

    def put_back(self) -> bool:
        held, self.held = self.held, None
        if held is None:
            return False
        random.setstate(held["python"])
        if held["numpy"] is not None:
            importlib.import_module("numpy").random.set_state(held["numpy"])
        torch.set_rng_state(held["torch"])
        if held["device"] is not None:
            device = _device_module()
            if device is None:
                _log.warning("pillion: the generator of the device is not put back: this process uses no accelerator")
            else:
                device.set_rng_state(held["device"])
        return True


def _device_module() -> Any:
    """Return torch's module of the accelerator, such as `torch.cuda`. None if this process has not begun to use one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return None
    module = torch.get_device_module(device)
    return module if getattr(module, "is_initialized", lambda: True)() else None
