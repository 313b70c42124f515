"""
torchtitan: a checkpoint manager that saves and loads through Pillion. One line of a config takes it into use:

    checkpoint=PillionCheckpointManager.Config(enable=True, interval=500, snapshot_interval=10)

Called from: torchtitan's trainer, through the public methods of its checkpoint managers. Releases differ in the hooks below these methods,
so this module overrides the methods themselves.
Must never: look into the checkpoint folder. In a pod the storage is mounted in the sidecar alone.

The state dict has torchtitan's own layout, with the model's FQNs at the top. So torchtitan's own manager and its converters read it. It also
has the random generators of each rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import checkpoint as stock
from torchtitan.components.checkpointer.base import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    BaseCheckpointManager,
    ModelWrapper,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import filesystem

from pillion.checkpointer import Checkpointer
from pillion.errors import IncompatibleCheckpoint, UsageError
from pillion.handle import SaveHandle
from pillion.state import AppState
from pillion.wire import names

__all__ = ["PillionCheckpointManager"]

_log = logging.getLogger(__name__)


class PillionCheckpointManager(BaseCheckpointManager):  # type: ignore[misc] # torchtitan has no types here
    """
    A checkpoint manager for torchtitan's `Trainer.Config.checkpoint`.

    Without a cluster, checkpoints go to `folder` below the dump folder. In a pod, the pod's own root and policy count.

    Args: as torchtitan passes them to every checkpoint manager.

    Ranks: all construct it together.

    Blocks: as `Checkpointer`.

    Raises:
        UsageError: the config requests `last_save_in_hf`.
        SettingsError, SidecarUnavailable: as `Checkpointer`.

    Source: torchtitan 0.3.0, torchtitan/components/checkpointer/base.py and dcp.py.
    """

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):  # type: ignore[misc] # as above
        """torchtitan's fields, and those of Pillion. Every field of torchtitan 0.3.0 counts except `last_save_in_hf`, which is refused."""

        snapshot_interval: int | None = None
        """Steps between snapshots in memory, beside `interval` for storage. None: no snapshots."""

        overlap: bool = True
        """Copy beside the next forward and backward pass. The next optimizer step waits for the copy."""

        policy: str | None = None
        """Path of a CheckpointPolicy. None: the policy of the pod or of PILLION_POLICY; without either, `interval`, `snapshot_interval`
        and `keep_latest_k`."""

        def __post_init__(self) -> None:
            BaseCheckpointManager.Config.__post_init__(self)  # slots=True makes another class, for which super() fails
            if self.snapshot_interval is not None and self.snapshot_interval < 1:
                raise ValueError(f"snapshot_interval is {self.snapshot_interval}: it must be at least 1 step, or None")
            # Here, and not when the trainer has built its model. A policy would come before both.
            decides = self.enable and self.policy is None and not os.environ.get(names.ENV_POLICY) and not _in_pod()
            if decides and self.snapshot_interval is not None and self.snapshot_interval >= self.interval:
                raise ValueError(
                    f"snapshot_interval is {self.snapshot_interval}: it must be less than interval, which is {self.interval}, or None,"
                    " as a save to storage is in memory as well"
                )

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Any,
        model_parts: list[torch.nn.Module],
        optimizers: Any,
        lr_schedulers: Any,
        states: dict[str, Any],
        sd_adapter: Any,
        base_folder: str = "",
    ) -> None:
        self.enable = bool(getattr(config, "enable", True))  # newer releases have no such field
        if not self.enable:
            return
        if config.last_save_in_hf:
            raise UsageError(
                "last_save_in_hf is not possible through Pillion: leave it out, and convert the last checkpoint with torchtitan's"
                " convert_to_hf.py, which reads it as it is"
            )
        self.save_future = self.staging_future = None  # the base class waits for these itself if they are set
        self.states = states
        self.states.update(
            {
                MODEL: ModelWrapper(model_parts),
                OPTIMIZER: optimizers,
                DATALOADER: dataloader,
                LR_SCHEDULER: lr_schedulers,
            }
        )
        self._config = config
        self._adapter = sd_adapter
        self._saved: SaveHandle | None = None
        self._rng = AppState().rng
        self.folder = filesystem.join(base_folder, config.folder)
        self._checkpointer = _checkpointer(config, self.folder)

    # --- loading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """
        Restore the state of `step`; -1 is the newest checkpoint, in memory or on storage. Without one, start from what `initial_load_path`
        or `initial_load_in_hf` name.

        Returns:
            Whether anything was loaded. If not, nothing has changed: the optimizers make no step for a template.

        Ranks, Blocks, Raises: as `Checkpointer.load`; ValueError for a name in `exclude_from_loading` that is no state.
        """
        if not self.enable:
            return False
        wanted = None if step == -1 else step
        found = self._checkpointer.find(wanted)
        if found is None and wanted is None:
            return self._load_initial()
        if wanted == 0 or (found is not None and found.step == 0):
            self._load_model(AppState(), wanted)  # a seed checkpoint has the model alone
            return True
        excluded = self._config.exclude_from_loading
        unknown = [key for key in excluded if key not in self.states]
        if unknown:
            raise ValueError(f"exclude_from_loading names {unknown}, and the states are {sorted(self.states)}")
        state = AppState({key: value for key, value in self.states.items() if key not in (MODEL, *excluded)})
        state["rng"] = self._rng
        try:
            self._load_model(state, wanted)
        except IncompatibleCheckpoint as err:
            err.add_note(
                "A run that ended with last_save_model_only=True cannot be continued from its last checkpoint."
            )
            raise
        self._put_back_behind_iterator()
        return True

    def _load_model(self, state: AppState, step: int | None) -> None:
        self._fill_model(state, lambda: state.load(self._checkpointer, step))

    def _fill_model(self, state: AppState, fill: Callable[[], object]) -> None:
        """Put the model's FQNs into `state`, call `fill`, and give the model its part of the result."""
        model = self.states[MODEL]
        fqns = model.state_dict().keys()
        state.update(model.state_dict())
        fill()
        model.load_state_dict({fqn: state[fqn] for fqn in fqns})

    def _load_initial(self) -> bool:
        config = self._config
        if config.initial_load_in_hf:
            self._load_hf(config.initial_load_path or getattr(self._adapter, "hf_assets_path", None))
            return True
        if not config.initial_load_path:
            _log.info("pillion: there is no checkpoint yet, and none to begin with: a fresh start")
            return False
        others = () if config.initial_load_model_only else (key for key in self.states if key != MODEL)
        state = AppState({key: self.states[key] for key in others if key not in config.exclude_from_loading})
        _log.info("pillion: training begins from %s", config.initial_load_path)
        if _in_pod() and os.path.isdir(config.initial_load_path):
            # The pod mounts it in the trainer, where the sidecar does not see it.
            self._fill_model(state, lambda: stock.load(state, checkpoint_id=config.initial_load_path))
        else:
            self._fill_model(state, lambda: self._checkpointer.load(state, path=config.initial_load_path))
        return True

    def _load_hf(self, path: str | None) -> None:
        """Load a model of Hugging Face's safetensors, as torchtitan's own manager does: in this process."""
        if self._adapter is None or not path:
            raise UsageError(
                "initial_load_in_hf needs a model with a state dict adapter, and initial_load_path or hf_assets_path for its files"
            )
        model = self.states[MODEL]
        state = self._adapter.to_hf(model.state_dict())
        reader = self._adapter.get_hf_storage_reader(path, self._config.initial_load_in_hf_quantized)
        stock.load(state, storage_reader=reader)
        model.load_state_dict(self._adapter.from_hf(state))

    def _put_back_behind_iterator(self) -> None:
        """Put the random generators back when the data loader has made its iterator, which draws from them."""
        loader = self.states[DATALOADER]
        make = getattr(loader, "_get_iterator", None)
        if make is None:  # no DataLoader of torch's: nothing draws
            self._rng.put_back()
            return

        def make_and_put_back() -> Any:
            with contextlib.suppress(AttributeError):
                del loader._get_iterator
            iterator = make()
            self._rng.put_back()
            return iterator

        loader._get_iterator = make_and_put_back

    # --- saving ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> bool:
        """
        Save if this step is due: by the policy, as the last step, or as the first one (`enable_first_step_checkpoint`).

        Returns:
            Whether a save began. It goes on beside the training; the last one is waited for in `close`.

        Ranks: all, at every step. Blocks: as `Checkpointer.save`.
        """
        if not self.enable or self._config.load_only:
            return False
        due = self._checkpointer.due(curr_step)
        forced = last_step or (curr_step == 1 and self._config.enable_first_step_checkpoint)
        if not due and not forced:
            return False
        if last_step and self._config.last_save_model_only:
            state = _exported(self.states[MODEL].state_dict(), TORCH_DTYPE_MAP[self._config.export_dtype])
        else:
            state = {key: value for key, value in self.states.items() if key != MODEL}
            state["rng"] = self._rng
            state.update(self.states[MODEL].state_dict())
        self._saved = self._checkpointer.save(
            state, curr_step, overlap=self._config.overlap and not last_step, persist=True if forced else None
        )
        return True

    def maybe_wait_for_staging(self) -> None:
        """Wait until the newest save has copied the state. Blocks: as the copy, and for a free slot under `overlap: Wait`."""
        if self.enable and self._saved is not None:
            self._saved.staged.exception()

    def maybe_wait_for_saving(self) -> None:
        """Wait until the newest save is on storage, or has failed; a failure is in the log. Blocks: every phase of a save has its own bound."""
        if self.enable and self._saved is not None:
            self._saved.error(None)

    def close(self) -> None:
        """Wait for the saves in flight, and end the session with the sidecar. Idempotent. Blocks: as `Checkpointer.close`."""
        checkpointer = getattr(self, "_checkpointer", None)
        if checkpointer is not None:
            checkpointer.close()


# The base class calls its abstract hooks from the public methods only, which are all overridden here. The hooks' names differ by release.
PillionCheckpointManager.__abstractmethods__ = frozenset()


def _in_pod() -> bool:
    return names.ENV_RUNTIME_DIR in os.environ


def _checkpointer(config: PillionCheckpointManager.Config, folder: str) -> Checkpointer:
    """Return the Checkpointer of this run, with the policy that counts."""
    if _in_pod():
        _log.info(
            "pillion: the pod's policy decides when to save and what to keep; the config's interval and folder have no effect"
        )
        return Checkpointer()
    if config.policy is not None or os.environ.get(names.ENV_POLICY):
        _log.info(
            "pillion: the policy given decides when to save and what to keep; the config's interval has no effect"
        )
        return Checkpointer(folder, policy=config.policy)
    trigger: dict[str, Any] = {"periodSteps": config.interval}
    if config.snapshot_interval is not None:
        trigger["snapshotSteps"] = config.snapshot_interval
    policy: dict[str, Any] = {"trigger": trigger}
    if config.keep_latest_k > 0:
        policy["retention"] = {"keepLast": config.keep_latest_k}
    return Checkpointer(folder, policy=policy)


def _exported(model: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the model's state dict with its floating-point tensors in another dtype, as torchtitan's last checkpoint has them."""
    return {
        fqn: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for fqn, value in model.items()
    }
