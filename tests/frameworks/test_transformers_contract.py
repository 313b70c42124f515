"""
The whole of: the names of Transformers that `pillion.transformers` overrides or reads exist, with the signature that it expects.

Called from: pytest, in the environment that has Transformers. A new release that renames one of them fails here, and not in a training.
"""

import dataclasses
import inspect
from pathlib import Path

import pytest
import transformers
from transformers import Trainer, trainer_callback

from pillion.transformers import STATE_FILE, PillionCallback, PillionTrainerMixin

OVERRIDDEN = {
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_scaler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_determine_best_metric": ("metrics", "trial"),
    "_load_best_model": (),
}
CALLED = {"store_flos": (), "add_callback": ("callback",)}
HOOKS = ("on_evaluate", "on_step_end", "on_epoch_end", "on_train_end")
ARGUMENTS = (
    *("output_dir", "save_strategy", "save_total_limit", "save_only_model", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better"),
    *("push_to_hub", "hub_strategy", "enable_jit_checkpoint"),
)
READ = {
    "train": ("TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))",),
    "_prepare_for_training": ("self._load_optimizer_and_scheduler(resume_from_checkpoint)",),
    "_run_epoch": ("self._load_rng_state(resume_from_checkpoint)",),
    "_maybe_log_save_evaluate": (
        "self._save_checkpoint(model, trial)",
        "is_new_best_metric = self._determine_best_metric(metrics=metrics, trial=trial)",
        "self.control.should_save = is_new_best_metric",
    ),
    "_finalize_training": ("self.state.best_model_checkpoint is not None:\n            self._load_best_model()",),
    "_init_training_state": ("self._load_callback_state()",),
}
"""Method -> what it does with a method or a file that is overridden."""


@pytest.mark.parametrize(("name", "parameters"), [*OVERRIDDEN.items(), *CALLED.items()])
def test_each_method_has_the_signature_that_is_expected(name: str, parameters: tuple[str, ...]) -> None:
    """The names of the arguments, in their order; and the mixin's own are the same."""
    for of in (Trainer, PillionTrainerMixin) if name in OVERRIDDEN else (Trainer,):
        assert tuple(inspect.signature(getattr(of, name)).parameters)[1:] == parameters


@pytest.mark.parametrize("name", READ)
def test_the_trainer_calls_what_is_overridden_where_it_is_expected(name: str) -> None:
    """A method that is called from elsewhere, or not at all, would be overridden in vain."""
    source = inspect.getsource(getattr(Trainer, name))
    assert [text for text in READ[name] if text not in source] == []


def test_callbacks_arguments_and_state_have_the_names_that_are_read(tmp_path: Path) -> None:
    """Hooks of a callback, arguments that are refused or read, the file of the state and its fields."""
    assert all(hasattr(transformers.TrainerCallback, name) and hasattr(PillionCallback, name) for name in HOOKS)
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    assert [name for name in ARGUMENTS if not hasattr(args, name)] == []
    assert str(args.save_strategy.value) == "steps"
    assert args.save_strategy == "steps"
    fields = {each.name for each in dataclasses.fields(trainer_callback.TrainerState)}
    assert {
        "global_step",
        "epoch",
        "log_history",
        "stateful_callbacks",
        "best_global_step",
        "best_model_checkpoint",
    } <= fields
    assert STATE_FILE == transformers.trainer.TRAINER_STATE_NAME
    assert isinstance(trainer_callback.TrainerControl(), trainer_callback.ExportableState)
