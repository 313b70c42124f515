"""
The state of an `accelerate.Accelerator` as one dict: `app_state`.

Called from: training scripts that call Accelerate. `Accelerator.save_state` writes files itself and has no hook that replaces them, so this
module reads what `prepare` and `register_for_checkpointing` have collected. tests/frameworks/test_accelerate.py has each name that it reads.
Must never: save or load by `Accelerator.save_state`.
Source: accelerate 1.15.0, accelerate/accelerator.py, accelerate/data_loader.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from accelerate.utils import DistributedType

from pillion.errors import UsageError
from pillion.state import AppState, Model, Optimizers, Whole

__all__ = ["AcceleratorState", "app_state"]

_REFUSED: Final = {
    DistributedType.DEEPSPEED: "DeepSpeed keeps its state in an engine of its own: use DDP or FSDP version 2",
    DistributedType.MEGATRON_LM: "Megatron-LM keeps its state in an engine of its own: use DDP or FSDP version 2",
}

BETWEEN_UPDATES: Final = (
    "pillion: saved between two updates of the weights: the gradients that were summed so far are not saved, so a resume from here differs; with"
    " gradient_accumulation_steps, save where accelerator.sync_gradients is true"
)

_log = logging.getLogger(__name__)


def app_state(accelerator: Any, **more: Any) -> AcceleratorState:
    """
    Return everything that `Accelerator.save_state` would write: models, optimizers, schedulers, scaler, registered objects, the random
    generators of each rank; and the position in each data loader.

    Args:
        accelerator: after `prepare`, and after `register_for_checkpointing`.
        more: other values by name: numbers, tensors, `Stateful` objects.

    Raises:
        UsageError: nothing is prepared, the accelerator's engine keeps its own state, or a name in `more` is taken.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if accelerator.distributed_type in _REFUSED:
        raise UsageError(_REFUSED[accelerator.distributed_type])
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError("FSDP version 1 communicates to give its state: set fsdp_version to 2")
    if any(getattr(each, "use_stateful_dataloader", False) for each in accelerator._dataloaders):
        raise UsageError("use_stateful_dataloader counts batches, as state.batches() does: leave it out")
    if not accelerator._models:
        raise UsageError("the accelerator has no model yet: call app_state after accelerator.prepare")
    state = AcceleratorState(accelerator)
    optimizers = [each.optimizer for each in accelerator._optimizers]
    for index, model in enumerate(accelerator._models):
        state[_named("model", index)] = Model(model)
        own = {id(each) for each in model.parameters()}
        mine = [each for each in optimizers if {id(one) for one in each.param_groups[0]["params"]} <= own]
        if mine:
            state[_named("optimizer", index)] = Optimizers(model, mine)
            optimizers = [each for each in optimizers if each not in mine]
    if optimizers:
        raise UsageError(
            "an optimizer has parameters of no single prepared model, so it has no names to be saved under"
        )
    for index, scheduler in enumerate(accelerator._schedulers):
        state[_named("scheduler", index)] = Whole(scheduler)
    if accelerator.scaler is not None:
        state["scaler"] = Whole(accelerator.scaler)
    for index, custom in enumerate(accelerator._custom_objects):
        state[_named("custom", index)] = custom
    for index, position in enumerate(state.positions):
        state[_named("position", index)] = Whole(position)
    state["rng"] = state.rng
    taken = sorted(state.keys() & more.keys())
    if taken:
        raise UsageError(f"the names {taken} have a meaning in app_state: choose others")
    state.update(more)
    return state


class AcceleratorState(AppState):
    """The state of an accelerator. `Checkpointer.save(state, step)` takes it; `load` fills it."""

    draws_late = True

    def __init__(self, accelerator: Any) -> None:
        super().__init__()
        self._accelerator = accelerator
        self.positions = [_Position(each) for each in accelerator._dataloaders]

    def batches(self, dataloader: Iterable[Any] | None = None) -> Iterator[Any]:
        """
        Iterate over one epoch of a prepared data loader. The first one after a load begins behind the last batch that was saved, and
        puts the random generators back.

        Args:
            dataloader: one that `prepare` has returned. None is the first one.

        Raises:
            UsageError: the loader is not prepared.
        """
        position = next((each for each in self.positions if dataloader is None or each.loader is dataloader), None)
        if position is None:
            raise UsageError("batches() takes a data loader that accelerator.prepare has returned")
        if not self.rng.within_epoch:
            self.rng.put_back()
        source = position.begin(self._accelerator)
        for batch in super().batches(source):
            position.batches += 1
            yield batch
        position.end()


class _Position:
    """How far a data loader is: its epoch, the batches of it that this rank has had, and what shuffled it at the epoch's beginning."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.batches = 0
        self._epoch = 0
        self._generator: torch.Tensor | None = None
        """State of the loader's own generator."""
        self._torch = torch.get_rng_state()
        """State of torch's generator. A sampler without one of its own takes its seed from there."""
        self._loaded = False
        self._counts = False
        self._is_warned = False
        """Whether the script was warned of a save between two updates."""

    def state_dict(self) -> dict[str, Any]:
        gradients = self.loader.gradient_state
        # Another loader, over which an evaluation iterates, has no position that a resume needs.
        if not self._counts and gradients.active_dataloader is self.loader:
            self._counts = True
            _log.warning(
                "pillion: the position in the data is not saved: iterate with state.batches(loader) rather than over the loader"
            )
        if self._counts and not gradients.sync_gradients and not self._is_warned:
            self._is_warned = True
            _log.warning(BETWEEN_UPDATES)
        return {"epoch": self._epoch, "batches": self.batches, "generator": self._generator, "torch": self._torch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self.batches = state["epoch"], state["batches"]
        self._generator, self._torch = state["generator"], state["torch"]
        self._loaded = True

    def begin(self, accelerator: Any) -> Any:
        """Return the loader of the epoch that begins, or what is left of the one that was saved."""
        self._counts = True
        shuffles = self.loader.synchronized_generator
        if not self._loaded:
            self._epoch, self.batches = self.loader.iteration, 0
            self._generator = None if shuffles is None else shuffles.get_state()
            self._torch = torch.get_rng_state()
            return self.loader
        self._loaded = False
        if shuffles is not None and self._generator is not None:
            shuffles.set_state(self._generator)
        if self.batches:  # behind it the caller puts back what was at the save
            torch.set_rng_state(self._torch)
        else:
            self._torch = torch.get_rng_state()
        rest = accelerator.skip_first_batches(self.loader, self.batches) if self.batches else self.loader
        rest.set_epoch(self._epoch)
        return rest

    def end(self) -> None:
        self._epoch, self.batches = self._epoch + 1, 0
        self.loader.iteration = self._epoch
        shuffles = self.loader.synchronized_generator
        self._generator = None if shuffles is None else shuffles.get_state()


def _named(kind: str, index: int) -> str:
    return kind if index == 0 else f"{kind}{index}"
