"""
Lightning: a checkpoint callback for every strategy, and a checkpoint plugin for code that has a `ModelCheckpoint`.

    trainer = Trainer(callbacks=[PillionCheckpoint("checkpoints/run-1")])     # resumes by itself
    trainer = Trainer(plugins=[PillionCheckpointIO()], callbacks=[ModelCheckpoint(...)])

Called from: Lightning's trainer, on every rank (the plugin: as Lightning calls it, on rank 0).
Must never: look for checkpoints in a directory (the callback). In a pod the storage is mounted in the sidecar alone.

Lightning has no public call that gives a checkpoint's dict without writing it, or takes one that was not read from a path. The private names
used here are listed in tests/frameworks/test_lightning.py, which fails when a release changes them.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any, Final

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint import state_dict as dcp_state

from pillion import addresses, policy_source
from pillion.checkpointer import Checkpointer
from pillion.errors import UsageError
from pillion.handle import SaveHandle
from pillion.lightning_data import Shuffles, generators
from pillion.lightning_io import PillionCheckpointIO
from pillion.state import AppState, Optimizers, PerRank, Whole
from pillion.wire import names

__all__ = ["PillionCheckpoint", "PillionCheckpointIO"]

_log = logging.getLogger(__name__)

_BETTER: Final = {"min": lambda value, best: value < best, "max": lambda value, best: value > best}


class PillionCheckpoint(Checkpoint):  # type: ignore[misc] # Lightning has no types here
    """
    Saves a fit through Pillion, and resumes it: the newest checkpoint, from memory or storage, is in place before training begins.

    Weights, optimizers, schedulers, loops, callbacks, precision, data module and loaders are those of Lightning's own checkpoints. Random
    generators come back too, also those that shuffle the data of several processes.

    Args:
        root: as for `Checkpointer`. Leave it out in a pod.
        policy: as for `Checkpointer`. It decides when to save, and what to keep.
        overlap: copy beside the next forward and backward pass.
        monitor: name of a logged metric. A validation that improves it saves to storage, beside the policy's saves. The save has the
            metric, so that the policy's `retention.keepBest` can keep it.
        mode: ``min`` or ``max``: which value of the metric is better.

    Ranks: all, each with its own.

    Raises:
        SettingsError: the policy, given as a mapping, has an error, or the root is no place. Lists all problems. At the start of the fit: as
            `Checkpointer`, also for a policy in a file.
        UsageError: at the start of the fit: the strategy is not supported, or `ckpt_path` was given although this run has a checkpoint. Each
            text says what to do instead.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        *,
        policy: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        overlap: bool = False,
        monitor: str | None = None,
        mode: str = "min",
    ) -> None:
        if mode not in _BETTER:
            raise UsageError(f"mode is {mode!r}: it must be 'min' or 'max'")
        # Now, and not at the fit, which begins when models and data are there. A file is read at the fit, by the sidecar's package.
        if isinstance(policy, Mapping):
            policy_source.document(policy, os.environ)
        if root is not None:
            addresses.check(addresses.absolute(root))
        self.monitor, self.mode = monitor, mode
        self.best_model_score: float | None = None
        self.checkpointer: Checkpointer | None = None
        """The run's Checkpointer. None before the fit."""
        self._root, self._policy, self._overlap = root, policy, overlap
        self._rng = AppState().rng
        self._shuffles = Shuffles()
        self._seen = 0
        """The step of the newest batch that was looked at."""
        self._is_better = False
        """Whether the validation of this step was the best so far, and the step is not saved yet."""
        self._metrics: dict[str, float] = {}
        """The metric of that validation."""
        self._stored: list[SaveHandle] = []
        """The newest save to storage that was committed, and those behind it."""
        self._best: SaveHandle | None = None
        self._best_to_be = ""
        """Directory that the best save will have."""
        self._earlier = {"best": "", "last": ""}
        """Paths from before a resume."""

    @property
    def last_model_path(self) -> str:
        """Directory of the newest checkpoint on storage that this run committed. Empty if there is none."""
        return next((path for path in map(_path, reversed(self._stored)) if path), self._earlier["last"])

    @property
    def best_model_path(self) -> str:
        """Directory of the checkpoint with the best value of `monitor`. Empty if there is none yet."""
        return (self._best is not None and _path(self._best)) or self._earlier["best"]

    def state_dict(self) -> dict[str, Any]:
        # This may be the state of the best save itself, which has no path before it is committed.
        best = self._best_to_be or self.best_model_path
        return {"score": self.best_model_score, "best": best, "last": self.last_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_model_score = state_dict["score"]
        self._earlier = {"best": state_dict["best"], "last": state_dict["last"]}

    # --- Lightning's hooks -----------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_strategy(trainer.strategy)
        self.checkpointer = Checkpointer(self._root, policy=self._policy)
        found = self.checkpointer.find()
        if found is None:
            self._follow_data(trainer)
            return
        if trainer.ckpt_path and trainer.strategy.restore_checkpoint_after_setup:
            raise UsageError(
                f"fit(ckpt_path={trainer.ckpt_path!r}) would replace step {found.step} of this run: leave ckpt_path out,"
                " PillionCheckpoint resumes by itself"
            )
        self._resume(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rng.put_back()  # where no loader has done it
        self._shuffles.go_on()
        self._seen = trainer.global_step
        if not all(hasattr(loader, "state_dict") for loader in _loaders(trainer)):
            _log.warning(
                "pillion: a data loader has no state to save, so a fit that resumes within an epoch trains on other batches than it"
                " would have: give the trainer torchdata's StatefulDataLoader"
            )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:
            return  # the batch added to the gradients; the optimizer has not stepped
        self._seen = step
        if trainer.is_last_batch or (self.monitor is not None and _validates_next(trainer)):
            return  # saved in one of the hooks below
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.monitor is None or self.checkpointer is None or not fitting:
            return
        value, best = trainer.callback_metrics.get(self.monitor), self.best_model_score
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            _log.warning(
                "pillion: no metric %r was logged, so no checkpoint is the best; there are: %s", self.monitor, known
            )
        better = value is not None and (best is None or _BETTER[self.mode](float(value), best))
        # All ranks, as they may have logged different values.
        self._is_better = trainer.strategy.reduce_boolean_decision(better)
        self._metrics = {} if value is None else {self.monitor: float(value)}
        if self._is_better:
            assert value is not None
            self.best_model_score = float(value)
        if not trainer.is_last_batch:
            self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not behind the last batch: from a checkpoint of there Lightning 2.6 ends the epoch twice, or trains no more.
        self._save_if_due(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.fit_loop.__dict__.pop("_load_combined_loader_states", None)
        if self.checkpointer is not None:
            self.checkpointer.close()

    # --- saving ----------------------------------------------------------------------------------------------------

    def _save_if_due(self, trainer: Trainer) -> None:
        """Save this step by the policy, or because it is the best one so far."""
        assert self.checkpointer is not None
        step, better, metrics = trainer.global_step, self._is_better, self._metrics
        self._is_better, self._metrics = False, {}
        if not self.checkpointer.due(step) and not better:
            return
        if better:
            root = addresses.absolute(self._root if self._root is not None else os.environ.get(names.ENV_ROOT, ""))
            self._best_to_be = f"{root}/{names.step_directory(step)}"
        handle = self.checkpointer.save(
            self._state(trainer), step, overlap=self._overlap, persist=True if better else None, metrics=metrics
        )
        committed = [index for index, each in enumerate(self._stored) if _path(each)]
        self._stored = [*self._stored[committed[-1] if committed else 0 :], handle]
        if better:
            self._best = handle
        if self._best is not None and self._best.committed.done() and self._best.error() is not None:
            self._best_to_be = ""  # the newest that was better was lost

    def _state(self, trainer: Trainer) -> AppState:
        """Return the state of the fit as it is now: to save, or as the template of a load."""
        strategy = trainer.strategy
        with _states_left_out(strategy):
            rest = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        model = strategy.model if _is_sharded(strategy) else trainer.lightning_module
        position = rest["loops"]["fit_loop"]["state_dict"].pop("combined_loader", [])
        ended = trainer.is_last_batch
        # Behind the last batch a loader begins anew, with what its generator draws next.
        loaders = {
            "position": [] if ended else position,
            "generators": [each.get_state() for each in generators(_loaders(trainer))],
            "shuffles": [] if ended else self._shuffles.state(),
        }
        state = AppState(state_dict=rest.pop("state_dict"))
        rest.pop("optimizer_states")
        if trainer.optimizers:
            state["optimizer"] = Optimizers(model, trainer.optimizers)
        # Averages of the weights, say, which callbacks and hooks add. As tensors they need no pickling.
        tensors = [key for key, value in rest.items() if _holds_tensors(value)]
        if tensors:
            state["tensors"] = {key: rest.pop(key) for key in tensors}
        state["rest"] = Whole(_Held(rest))
        state["loaders"] = PerRank(_Held(loaders))
        self._rng.note_epoch(within=not ended)
        state["rng"] = self._rng
        return state

    # --- resuming --------------------------------------------------------------------------------------------------

    def _resume(self, trainer: Trainer) -> None:
        """Load the newest checkpoint, and leave it where Lightning's own restore looks for it."""
        assert self.checkpointer is not None
        strategy, connector = trainer.strategy, trainer._checkpoint_connector
        state = self._state(trainer)
        step = state.load(self.checkpointer)
        assert step is not None
        checkpoint = {
            **state["rest"].inner.value,
            **state.get("tensors", {}),
            "state_dict": state["state_dict"],
            "optimizer_states": [],  # they are in place
        }
        loaders = state["loaders"].inner.value
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders["position"]
        if _is_sharded(strategy):
            dcp_state.set_model_state_dict(strategy.model, state["state_dict"])
        connector._loaded_checkpoint = checkpoint
        if not strategy.restore_checkpoint_after_setup:  # for the others the connector does it next
            connector.restore_datamodule()
            connector.restore_model()
            connector.restore_callbacks()
        self._follow_data(trainer, loaders)
        _log.info("pillion: the fit goes on behind step %d", step)

    def _follow_data(self, trainer: Trainer, loaded: Mapping[str, Any] | None = None) -> None:
        """
        Follow the loaders from before Lightning makes their iterators.

        Args:
            loaded: what their samplers and generators had. They get it then, and the random generators are put back at their moment.

        Lightning sets the epoch of a sampler when the iterators are made already.
        """
        loop, within = trainer.fit_loop, self._rng.within_epoch
        load = loop._load_combined_loader_states
        waiting = [loaded] if loaded is not None else []

        def load_in_order() -> None:
            loaders = _loaders(trainer)
            self._shuffles.follow(loaders)
            if not waiting:
                load()
                return
            had = waiting.pop()
            for loader in loaders:
                _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
            if within:
                self._shuffles.repeat(had.get("shuffles", []))
            else:  # the iterators are new ones, and draw as they would have drawn
                self._rng.put_back()
                for generator, before in zip(generators(loaders), had["generators"], strict=False):
                    generator.set_state(before)
            load()
            stateful = [each for each in loaders if hasattr(each, "_get_iterator") and hasattr(each, "state_dict")]
            if stateful:
                self._put_back_behind_iterator(stateful[-1])

        loop._load_combined_loader_states = load_in_order

    def _put_back_behind_iterator(self, loader: Any) -> None:
        """Put the random generators back when the loader has made the iterator of its loaded state, which draws from them."""
        make = loader._get_iterator

        def make_and_put_back() -> Any:
            del loader._get_iterator
            iterator = make()
            self._rng.put_back()
            return iterator

        loader._get_iterator = make_and_put_back


class _Held:
    """A value as a `Stateful`."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state_dict: Any) -> None:
        self.value = state_dict


def _path(handle: SaveHandle) -> str:
    """Return the directory of a committed save. Empty if it failed, is in flight or stays in memory. Does not set `examined`."""
    if not handle.staged.done() or not handle.committed.done() or handle.error() is not None:
        return ""
    return futures.Future.result(handle.committed).path or ""


def _holds_tensors(value: object) -> bool:
    """Whether a value is a dict of tensors alone, such as a state dict of weights."""
    return isinstance(value, dict) and bool(value) and all(isinstance(each, torch.Tensor) for each in value.values())


def _loaders(trainer: Trainer) -> list[Any]:
    """Return the training loaders. Empty before Lightning has prepared them."""
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def _is_sharded(strategy: Any) -> bool:
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def _check_strategy(strategy: Any) -> None:
    """
    Raises:
        UsageError: the strategy's state is not one that all ranks save together.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise UsageError(
            f"PillionCheckpoint does not know {type(strategy).__name__}: use the strategies auto, ddp, fsdp or ModelParallelStrategy"
        )


def _validates_next(trainer: Trainer) -> bool:
    """Whether a validation follows the batch that has just ended."""
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


@contextlib.contextmanager
def _states_left_out(strategy: Any) -> Iterator[None]:
    """
    Within it the strategy gives no optimizer states, which `Optimizers` takes by FQN, and its sharded weights as they are.

    On its own it copies both to the CPU, or gathers them on rank 0.
    """
    strategy.optimizer_state = lambda _: {}
    if _is_sharded(strategy):
        strategy.lightning_module_state_dict = lambda: dcp_state.get_model_state_dict(strategy.model)
    try:
        yield
    finally:
        del strategy.optimizer_state
        strategy.__dict__.pop("lightning_module_state_dict", None)
