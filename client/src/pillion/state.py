"""
The state of a training script as one dict: `app_state`, and the wrappers `Rng`, `Whole` and `PerRank`.

Called from: training scripts, and the modules of frameworks. Model and optimizers are keyed by FQN, as `torch.distributed.checkpoint` does.
Must never: change an optimizer that has not stepped yet. `get_optimizer_state_dict` steps it, and Adam counts that step.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Final

import torch
from torch.distributed.checkpoint import state_dict as dcp_state

from pillion import own_state
from pillion.checkpointer import Checkpointer
from pillion.errors import IncompatibleCheckpoint, UsageError
from pillion.own_state import PerRank, Rng, Stateful, Whole

__all__ = ["AppState", "PerRank", "Rng", "Whole", "app_state"]

_END: Final = object()


def app_state(
    model: torch.nn.Module,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    *,
    schedulers: Stateful | Sequence[Stateful] = (),
    dataloader: Stateful | None = None,
    rng: bool = True,
    **more: Any,
) -> AppState:
    """
    Return the whole state of a training script, to save and to load.

    Args:
        model: plain, or wrapped by DDP or FSDP2. The names of its weights are the same in each case.
        optimizers: one or several, whose parameters are the model's.
        schedulers: learning rate schedules, one or several.
        dataloader: torchdata's `StatefulDataLoader`, or any other loader with a state. Each rank has its own.
        rng: whether the random generators of each rank are a part of it. `AppState.batches` puts them back.
        more: other values by name: numbers, tensors, `Stateful` objects.

    Raises:
        UsageError: a name in `more` is taken, or the data loader has no state.
    """
    state = AppState(model=Model(model))
    if many := _listed(optimizers):
        state["optimizer"] = Optimizers(model, many)
    for index, scheduler in enumerate(_listed(schedulers)):
        state["scheduler" if index == 0 else f"scheduler{index}"] = Whole(scheduler)
    if dataloader is not None:
        if not hasattr(dataloader, "load_state_dict"):
            raise UsageError(
                f"a {type(dataloader).__name__} has no state to save: use torchdata's StatefulDataLoader, or leave dataloader out"
            )
        state["dataloader"] = PerRank(dataloader)
        state.dataloader = dataloader
    # Behind the loader, whose state may be made when it is asked for.
    if rng:
        state["rng"] = state.rng
    taken = sorted(state.keys() & more.keys())
    if taken:
        raise UsageError(f"the names {taken} have a meaning in app_state: choose others")
    state.update(more)
    return state


class AppState(dict[str, Any]):
    """
    A state dict of `Stateful` objects and values. `Checkpointer.save(state, step)` takes it as it is; `load` fills it.

    Attributes:
        rng: the random generators of this rank. They are a part of the state unless `app_state` was told otherwise.
        dataloader: the loader of `batches`.
    """

    draws_late: ClassVar[bool] = False
    """Whether loaders draw when their first batch is asked for, rather than when their iterator is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rng = Rng()
        self.dataloader: Any = None

    def load(
        self,
        checkpointer: Checkpointer,
        step: int | None = None,
        *,
        strict: bool = True,
        path: str | os.PathLike[str] | None = None,
    ) -> int | None:
        """
        Fill the state from the newest checkpoint. Without a checkpoint nothing is built or changed, and training is as without Pillion.

        In a world of another size, a rank without a `PerRank` state in the checkpoint keeps its own, with a warning.

        Args:
            checkpointer: where to load from.
            step: a committed step; None for the newest.
            strict, path: as for `Checkpointer.load`.

        Returns:
            The step loaded. None if there is none.

        Ranks, Blocks, Raises: as `Checkpointer.load`.
        """
        if step is None and checkpointer.find(path=path) is None:
            return None
        with own_state.only_names():
            try:
                return checkpointer.load(self, step, strict=strict, path=path)
            except IncompatibleCheckpoint as err:
                # Every rank has the same error, so all of them load again.
                if not strict or not err.fqns or self._needed(err.fqns):
                    raise
            loaded = checkpointer.load(self, step, strict=False, path=path)
        needed = self._needed(checkpointer.last_load.missing) if checkpointer.last_load is not None else []
        if needed:
            raise IncompatibleCheckpoint(f"step {loaded} lacks {', '.join(map(repr, needed))}", fqns=needed)
        return loaded

    def batches(self, dataloader: Iterable[Any] | None = None) -> Iterator[Any]:
        """
        Iterate over one epoch of the data loader, and put the random generators back where a load has read them.

        Args:
            dataloader: None is the loader of `app_state`.
        """
        loader: Any = self.dataloader if dataloader is None else dataloader
        if loader is None:
            raise UsageError("batches() needs a loader: pass it, or give dataloader= to app_state")
        if not self.rng.within_epoch:
            self.rng.put_back()
        batches = iter(loader)
        first = [next(batches, _END)] if self.draws_late else []
        self.rng.put_back()
        self.rng.note_epoch(within=True)
        yield from (each for each in first if each is not _END)
        yield from batches
        self.rng.note_epoch(within=False)

    def _needed(self, missing: Iterable[str]) -> list[str]:
        """Return the FQNs that a checkpoint may not lack, among those that it lacks."""
        below: dict[str, list[str]] = {}
        for fqn in missing:
            key = next((key for key in self if fqn == key or fqn.startswith(f"{key}.")), fqn)
            below.setdefault(key, []).append(fqn[len(key) + 1 :])
        return [
            f"{key}.{name}" if name else key
            for key, names in below.items()
            if not self._may_lack(self.get(key), names)
            for name in names
        ]

    @staticmethod
    def _may_lack(value: object, names: Sequence[str]) -> bool:
        if isinstance(value, Optimizers):
            return value.may_lack(frozenset(names))
        return all(own_state.is_of_a_rank(value, name) for name in names)


class Model:
    """
    A model's weights and buffers by FQN, as `get_model_state_dict` names them: without the prefixes of DDP, FSDP and `torch.compile`.

    Args:
        model: as for `app_state`.
        options: of `torch.distributed.checkpoint.state_dict`; None is a sharded state of everything.
    """

    def __init__(self, model: torch.nn.Module, options: dcp_state.StateDictOptions | None = None) -> None:
        self._model, self._options = model, options

    def state_dict(self) -> dict[str, Any]:
        return dcp_state.get_model_state_dict(self._model, options=self._options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        dcp_state.set_model_state_dict(self._model, state_dict, options=self._options)


class Optimizers:
    """
    The state of a model's optimizers by FQN. `state_dict` leaves an optimizer without a state as it is.

    Args:
        model: the model whose parameters they update.
        optimizers: torch's own objects, not a framework's wrapper of them.
    """

    def __init__(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._model, self._optimizers = model, list(optimizers)
        self._asked: dict[str, Any] = {"state": {}}

    def state_dict(self) -> dict[str, Any]:
        fresh = [_Fresh(each) for each in self._optimizers if not each.state]
        try:
            # The tensors stay alive in the result, and a load fills them there.
            state: dict[str, Any] = dcp_state.get_optimizer_state_dict(self._model, self._optimizers)
        except KeyError as err:
            raise UsageError(
                f"an optimizer has a parameter that is not the model's ({err}): save that optimizer under a name of its own"
            ) from err
        finally:
            never = [values for one in fresh for values in one.restore()]
        for values in never:
            _set_no_steps(values)
        self._asked = state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        dcp_state.set_optimizer_state_dict(self._model, self._optimizers, state_dict)
        for each in self._optimizers:
            for parameter, values in list(each.state.items()):
                if "step" in values and float(values["step"]) == 0:
                    del each.state[parameter]

    def may_lack(self, names: Collection[str]) -> bool:
        """
        Return whether a checkpoint may lack these names: they are all of the state of some parameters, and other parameters have theirs.

        A parameter that never had a gradient has no state. A template has one for it.

        Args:
            names: FQNs below the key of this object.
        """
        lacking = 0
        for fqn, values in self._asked["state"].items():
            own = [f"state.{fqn}.{key}" for key in values]
            missing = [any(name == each or name.startswith(f"{each}.") for name in names) for each in own]
            if any(missing) and not all(missing):
                return False
            lacking += any(missing)
        return all(name.startswith("state.") for name in names) and lacking < len(self._asked["state"])


class _Fresh:
    """What an optimizer was before torch made its state by a step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self) -> list[dict[str, Any]]:
        """Put the optimizer back. Return the state that it had for each parameter."""
        made = list(self._optimizer.state.values())
        self._optimizer.state.clear()
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            for key in group.keys() - before.keys() - {"params"}:
                del group[key]
            group.update(before)
        return made


def _set_no_steps(values: dict[str, Any]) -> None:
    """Say in the state of a parameter that it made no step. So a load of it gives an optimizer that is new again."""
    if isinstance(values.get("step"), torch.Tensor):
        values["step"].zero_()
    elif "step" in values:
        values["step"] = 0


def _listed(one_or_many: Any) -> list[Any]:
    return list(one_or_many) if isinstance(one_or_many, (list, tuple)) else [one_or_many]
