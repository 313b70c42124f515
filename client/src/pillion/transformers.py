"""
Pillion in the Trainer of Hugging Face Transformers: `PillionTrainer`, or `PillionTrainerMixin` before another trainer (those of trl).

Called from: training scripts. The Trainer has no hook for a checkpoint backend, so the mixin overrides the methods that write and read one.
tests/frameworks/test_transformers_contract.py has each of these names with its signature.
Must never: write or read a directory `checkpoint-N`. In a pod only the sidecar has the storage.
Source: transformers 5.24.0, transformers/trainer.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import numbers
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from pillion.checkpointer import Checkpointer
from pillion.errors import LoadError, UsageError
from pillion.state import AppState, Model, Optimizers, Rng, Whole
from pillion.wire import names

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

__all__ = ["PillionCallback", "PillionTrainer", "PillionTrainerMixin", "resume_step"]

END_WAIT_S: Final = 300.0
"""How long the end of training waits for its last saves. The end of the process waits for them as well (`pillion.exit_drain`)."""
STATE_FILE: Final = "trainer_state.json"
"""Where the Trainer looks for the position in the data and for the state of callbacks, in the directory that it resumes from."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint to resume from."""

    step: int | None
    """None: the newest below the path."""
    path: str | None
    """Of another run; None is the trainer's own."""


class PillionCallback(TrainerCallback):  # type: ignore[misc] # transformers is not where the types are checked
    """
    Asks for a save at the steps that the policy wants, beside the Trainer's own `save_strategy`. `PillionTrainerMixin` adds it.

    Args:
        checkpointer: the trainer's own.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.strategy_asked = False
        """Whether the Trainer's own strategy asked for the save, which then goes to storage."""
        self.is_due = False
        """Whether the policy wants this step."""
        self._metrics: tuple[int, dict[str, float]] = (-1, {})
        """The newest step that was evaluated, and the numbers of its evaluations."""

    def metrics(self, step: int) -> dict[str, float]:
        """Return what the evaluations of this step have measured. Empty if there was none."""
        measured, values = self._metrics
        return values if measured == step else {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # One call for each of several data sets.
        new = {name: float(each) for name, each in (metrics or {}).items() if isinstance(each, numbers.Real)}
        self._metrics = (state.global_step, self.metrics(state.global_step) | new)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self.strategy_asked = bool(control.should_save)
        self.is_due = due = self.checkpointer.due(state.global_step)
        # The end of the epoch asks again for this step, and then for storage.
        if due and not (args.save_strategy == "epoch" and float(state.epoch).is_integer()):
            control.should_save = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.strategy_asked = bool(control.should_save)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            self.checkpointer.wait(END_WAIT_S)
        except TimeoutError as err:
            _log.warning("pillion: training has ended, and %s", err)


class PillionTrainerMixin(_Base):  # type: ignore[misc] # as above
    """
    Makes a Trainer save through Pillion and resume from it: `class MyTrainer(PillionTrainerMixin, SFTTrainer)`.

    `save_strategy` decides as always. Besides, the policy decides; with `save_strategy="no"` it decides alone. Retention is the policy's
    (where the trainer makes the Checkpointer, `save_total_limit` is its `keepLast`, and `metric_for_best_model` its `keepBest`). A save behind
    an evaluation has its metrics. `load_best_model_at_end` loads the weights of the best step from its checkpoint.

    Args:
        checkpointer: None makes one on `args.output_dir`, or in a pod on what the pod's policy says.
        args, kwargs: of the trainer.

    Raises:
        UsageError: an argument of the training has no meaning here. Says what does it instead.
    """

    def __init__(self, *args: Any, checkpointer: Checkpointer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)
        self.checkpointer = checkpointer if checkpointer is not None else _checkpointer(self.args)
        self._pillion_rng = Rng()
        self._pillion_source: _Source | None = None
        """What `train` resumes from. None: nothing, or a directory that the Trainer loads."""
        self._pillion_best: str | None = None
        """Directory or URL of the best checkpoint, as the run before has noted it."""
        self._pillion_callback = PillionCallback(self.checkpointer)
        self.add_callback(self._pillion_callback)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """
        Train.

        Args:
            resume_from_checkpoint: True resumes from the newest checkpoint in memory or on storage, and begins anew if there is none. A
                path is another run's root or checkpoint, as for `Checkpointer.load`; a directory of the Trainer's own format is loaded by
                the Trainer.
            trial: not with Pillion.
            ignore_keys_for_eval: as for the Trainer.

        Ranks: all.

        Raises:
            UsageError: a hyperparameter search, or a path without a checkpoint.
            LoadError: as `Checkpointer.load`.
        """
        if trial is not None:
            raise UsageError(
                "a hyperparameter search has many runs: Pillion saves one, so search with the Trainer itself"
            )
        self._pillion_source = None
        path = os.fspath(resume_from_checkpoint) if isinstance(resume_from_checkpoint, (str, os.PathLike)) else None
        if path is not None and (Path(path) / STATE_FILE).is_file():
            return super().train(path, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        found = self.checkpointer.find(path=path)
        if path is not None and found is None:
            raise UsageError(f"there is no checkpoint in {path}, neither of Pillion nor of a Trainer ({STATE_FILE})")
        if found is None or not resume_from_checkpoint:
            if found is not None:
                _log.warning(
                    "pillion: training begins anew, though there is a checkpoint of step %d: pass resume_from_checkpoint=True"
                    " to resume from it",
                    found.step,
                )
            return super().train(None, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        self._pillion_source = _Source(None if path is not None else found.step, path)
        # The Trainer reads its position from a file, before it has an optimizer that could be filled.
        read = self.checkpointer.read(self._pillion_source.step, prefix="trainer", path=path)
        with tempfile.TemporaryDirectory(prefix="pillion-trainer-") as folder:
            document = json.loads(read["trainer"])
            # The Trainer looks for it as a directory, which storage need not be here.
            self._pillion_best = document.pop("best_model_checkpoint", None)
            (Path(folder) / STATE_FILE).write_text(json.dumps(document))
            return super().train(folder, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)

    def _pillion_model(self) -> Model:
        # Adapters alone, as the Trainer does: the base model is elsewhere, and does not change.
        options = StateDictOptions(ignore_frozen_params=True, strict=False) if _is_peft(self.model) else None
        return Model(self.model, options)

    def _pillion_state(self) -> AppState:
        state = AppState(
            model=self._pillion_model(),
            optimizer=Optimizers(self.model, [_inner(self.optimizer)]),
            scheduler=Whole(self.lr_scheduler),
        )
        if getattr(self.accelerator, "scaler", None) is not None:
            state["scaler"] = Whole(self.accelerator.scaler)
        state["rng"] = self._pillion_rng
        if self.args.process_index == 0:  # its logs have times, which differ from rank to rank
            state["trainer"] = ""
        return state

    # --- what the Trainer calls -----------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        step = self.state.global_step
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = f"{self.checkpointer.root}/{names.step_directory(step)}"
        state = self._pillion_state()
        if "trainer" in state:
            state["trainer"] = _document(self)
        persist = True if self._pillion_callback.strategy_asked else None
        self.checkpointer.save(state, step, persist=persist, metrics=self._pillion_callback.metrics(step))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With save_strategy="best" the answer decides whether this step is saved.
        better = bool(super()._determine_best_metric(metrics, trial))
        if self.args.save_strategy != "best":
            return better
        self._pillion_callback.strategy_asked = better
        return better or self._pillion_callback.is_due

    def _load_best_model(self) -> None:
        where = self.state.best_model_checkpoint
        if names.parse_step_directory(where.rpartition("/")[2]) is None:
            super()._load_best_model()  # a directory of the Trainer's own, from before
            return
        try:
            self.checkpointer.wait(END_WAIT_S)  # it may be the last one
            AppState(model=self._pillion_model()).load(self.checkpointer, path=where)
        except (TimeoutError, LoadError) as err:
            _log.error("pillion: the weights stay those of the last step, as %s cannot be loaded: %s", where, err)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._pillion_source is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # Otherwise the weights come with the optimizer, which does not exist yet.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._pillion_source is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            source = self._pillion_source
            self.state.best_model_checkpoint = self._pillion_best
            self._pillion_state().load(self.checkpointer, source.step, path=source.path)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._pillion_source is None:
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The Trainer calls it once the iterator of the resumed epoch is where it was.
        if self._pillion_source is None:
            super()._load_rng_state(checkpoint)
        else:
            self._pillion_rng.put_back()


class PillionTrainer(PillionTrainerMixin, Trainer):  # type: ignore[misc] # as above
    """The Trainer of Transformers, which saves through Pillion."""


def resume_step(trainer: PillionTrainerMixin) -> int | None:
    """
    Return the step that `train(resume_from_checkpoint=True)` would resume from. None if there is no checkpoint.

    Ranks, Blocks, Raises: as `Checkpointer.find`.
    """
    found = trainer.checkpointer.find()
    return None if found is None else found.step


def _checkpointer(args: Any) -> Checkpointer:
    if names.ENV_ROOT in os.environ:
        return Checkpointer()
    limited = args.save_total_limit is not None and names.ENV_POLICY not in os.environ
    made = Checkpointer(args.output_dir, policy={"retention": _retention(args)} if limited else None)
    # The Trainer's own strategy saves; then a policy that asks for nothing is no mistake.
    made._schedule.warns_of_no_trigger &= args.save_strategy == "no"
    return made


def _retention(args: Any) -> dict[str, Any]:
    """Return which checkpoints stay: as many of the newest as the Trainer would keep, and its best one."""
    kept: dict[str, Any] = {"keepLast": args.save_total_limit}
    if args.metric_for_best_model is not None:
        metric = args.metric_for_best_model
        name = metric if metric.startswith("eval_") else f"eval_{metric}"
        kept["keepBest"] = {"metric": name, "mode": "Max" if args.greater_is_better else "Min"}
    return kept


def _check(trainer: Any) -> None:
    """Refuse what would be ignored otherwise."""
    args, problems = trainer.args, []
    if trainer.is_deepspeed_enabled:
        problems.append("deepspeed keeps its state in an engine of its own: use DDP or FSDP version 2")
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        problems.append("FSDP version 1 communicates to give its state: set fsdp_config['version'] to 2")
    if args.push_to_hub and args.hub_strategy != "end":
        problems.append(
            f"push_to_hub pushes each directory checkpoint-N: set hub_strategy to 'end' (it is {args.hub_strategy!s})"
        )
    if args.save_only_model:
        problems.append("save_only_model leaves nothing to resume from: call save_model() at the end")
    if getattr(args, "enable_jit_checkpoint", False):
        problems.append(
            "enable_jit_checkpoint saves at SIGTERM, which the policy's trigger.onTermination does: leave it out"
        )
    if getattr(trainer, "use_adaptive_entropy", False):
        problems.append("use_adaptive_entropy keeps a file in a directory checkpoint-N, which there is none of")
    if problems:
        raise UsageError("; ".join(problems))


def _document(trainer: Any) -> str:
    """Return the TrainerState with the state of all callbacks, as the Trainer writes it to its file."""
    callbacks: dict[str, list[Any]] = {}
    for each in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(each, ExportableState):
            callbacks.setdefault(type(each).__name__, []).append(each.state())
    document = dataclasses.asdict(trainer.state)
    document["stateful_callbacks"] = {
        name: states[0] if len(states) == 1 else states for name, states in callbacks.items()
    }
    return json.dumps(document, sort_keys=True)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer within Accelerate's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def _is_peft(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
