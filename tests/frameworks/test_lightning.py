"""
Lightning's trainer with `PillionCheckpoint` and `PillionCheckpointIO`: the same training as without them, and as without a break.

Called from: pytest. Lightning is imported once, in this process; each run is forked from it.
"""

import inspect
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from pillion.errors import SettingsError, UsageError
from process.ranks import Ranks
from support.deadlines import Deadline

STEPS: Final = 12
"""Three epochs of four batches."""
POLICY: Final = {"trigger": {"periodSteps": 5, "snapshotSteps": 1}}
LAUNCHED: Final = {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
"""What torchrun sets: without it Lightning starts the script once more for each rank."""


@pytest.fixture(scope="module")
def job(warm: None) -> Any:
    """Lightning, imported before any test forks."""
    from frameworks import lightning_job

    return lightning_job


def saving(root: Path, **options: Any) -> Any:
    from pillion.lightning import PillionCheckpoint

    return lambda: [PillionCheckpoint(root, **{"policy": POLICY} | options)]


def run(ranks: Ranks, body: Any, num_ranks: int) -> list[dict[str, Any]]:
    return ranks.start(body, num_ranks=num_ranks, env=LAUNCHED if num_ranks > 1 else {}).finish(Deadline.SCRIPT)


def killed(ranks: Ranks, body: Any, num_ranks: int, out: Path) -> list[dict[int, float]]:
    """Run until every rank has ended itself as if killed, and return the losses that each had by then."""
    started = ranks.start(body, num_ranks=num_ranks, env=LAUNCHED if num_ranks > 1 else {})
    for trainer in started.trainers:
        with pytest.raises(AssertionError, match="ended with 7"):
            trainer.hear(Deadline.SCRIPT)
    told = [json.loads((out / f"killed.{rank}").read_text())["losses"] for rank in range(num_ranks)]
    return [{int(step): loss for step, loss in losses.items()} for losses in told]


@pytest.mark.parametrize(
    ("strategy", "num_ranks", "kills"), [("auto", 1, (4, 10)), ("ddp", 2, (4, 10)), ("fsdp2", 2, (2, 11))]
)
def test_a_fit_that_is_killed_twice_equals_one_without_pillion(
    job: Any, ranks: Ranks, tmp_path: Path, strategy: str, num_ranks: int, kills: tuple[int, int]
) -> None:
    """
    Losses, weights and random numbers, bit for bit: until the first kill, from memory, and then from storage. It is killed at the end of an
    epoch, and within a later one; with several processes too, whose sampler Lightning wraps.
    """
    plain = run(ranks, job.fits(tmp_path / "plain", strategy, list), num_ranks)

    out, callbacks = tmp_path / "run", saving(tmp_path / "ckpt")
    first = killed(ranks, job.fits(out, strategy, callbacks, kill_after=kills[0]), num_ranks, out)
    second = killed(ranks, job.fits(out, strategy, callbacks, kill_after=kills[1]), num_ranks, out)
    os.kill(ranks.sidecar(), signal.SIGTERM)  # it brings its newest snapshot to storage, and takes the arena with it
    ranks.alone()
    third = run(ranks, job.fits(out, strategy, callbacks), num_ranks)

    for rank in range(num_ranks):
        losses = plain[rank]["losses"]
        assert first[rank] == {step: losses[step] for step in range(1, kills[0] + 1)}
        assert second[rank] == {step: losses[step] for step in range(kills[0] + 1, kills[1] + 1)}
        assert third[rank]["losses"] == {step: losses[step] for step in range(kills[1] + 1, STEPS + 1)}
        assert (third[rank]["tier"], third[rank]["from"]) == ("storage", kills[1])
        assert third[rank]["weights"] == plain[rank]["weights"]
        assert third[rank]["random"] == plain[rank]["random"]


def test_the_best_checkpoint_is_saved_kept_and_known_after_a_resume(job: Any, ranks: Ranks, tmp_path: Path) -> None:
    """A validation that improves the metric is on storage with it, and neither retention nor a restart loses it."""
    policy = {"retention": {"keepLast": 1, "keepBest": {"metric": "val", "mode": "Min"}}, "trigger": {"periodSteps": 5}}
    callbacks = saving(tmp_path / "ckpt", policy=policy, monitor="val")
    options = {"limit_val_batches": 1, "val_check_interval": 0.5, "num_sanity_val_steps": 0}
    out = tmp_path / "run"
    killed(ranks, job.fits(out, "auto", callbacks, kill_after=7, **options), 1, out)
    (told,) = run(ranks, job.fits(out, "auto", callbacks, **options), 1)
    best = tmp_path / "ckpt/step-4"
    assert told["best"] == str(best)
    assert told["last"] == str(tmp_path / "ckpt/step-10")
    assert sorted(path.name for path in (tmp_path / "ckpt").glob("step-*")) == ["step-10", "step-4"]
    assert json.loads((best / "pillion-manifest.json").read_text())["metrics"] == {"val": 0.0}


def test_a_model_checkpoint_saves_and_resumes_through_the_plugin(job: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Lightning's own callback, with a link to the newest: what it resumes equals what it resumes from files of Lightning's own."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    from pillion.lightning import PillionCheckpointIO

    def body(_: Any) -> dict[str, Any]:
        told = {}
        for how, plugins in (("own", list), ("pillion", lambda: [PillionCheckpointIO()])):
            folder = tmp_path / how

            def keeping(folder: Path = folder) -> list[Any]:
                return [
                    ModelCheckpoint(
                        folder,
                        every_n_train_steps=3,
                        save_top_k=2,
                        monitor="step",
                        mode="max",
                        filename="{step}",
                        save_last="link",
                    )
                ]

            job.fit(tmp_path / "out", "auto", keeping, plugins=plugins, epochs=2)
            told[how] = job.fit(tmp_path / "out", "auto", keeping, plugins=plugins, ckpt_path=str(folder / "last.ckpt"))
            told[how]["kept"] = sorted(path.name for path in folder.iterdir())
            for name in ("best", "last"):
                del told[how][name]
        return told

    (told,) = ranks.start(body).finish(Deadline.SCRIPT)
    assert min(told["own"]["losses"]) == 7
    assert told["pillion"] == told["own"]
    assert (tmp_path / "pillion/last.ckpt/.metadata").exists()


def test_the_plugin_gives_back_any_checkpoint_as_it_was(job: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Tensors anywhere, empty containers and keys that are no text; again to the same path, and removed."""
    from pillion.lightning import PillionCheckpointIO

    def body(_: Any) -> None:
        plugin = PillionCheckpointIO()
        for value in (1.0, 2.0):
            checkpoint = {
                "state_dict": {"a.b": torch.full((3,), value), "c": torch.tensor(7)},
                "optimizer_states": [
                    {"state": {0: {"step": torch.tensor(value)}}, "param_groups": [{"betas": (0.9, 0.99)}]},
                    {},
                ],
                "epoch": 3,
                "mine": {"path": Path("x"), "pair": (torch.ones(2), [])},
            }
            plugin.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
        found = plugin.load_checkpoint(tmp_path / "a.ckpt")
        assert repr(found) == repr(
            {key: checkpoint[key] for key in ("optimizer_states", "epoch", "mine", "state_dict")}
        )
        plugin.teardown()
        plugin.remove_checkpoint(tmp_path / "a.ckpt")
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(UsageError, match="storage_options"):
            plugin.save_checkpoint(checkpoint, tmp_path / "b.ckpt", storage_options={"x": 1})

    ranks.start(body).finish(Deadline.SCRIPT)


def test_what_is_not_possible_is_refused_by_name(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal says what to do instead."""
    from pillion import lightning as module

    with pytest.raises(UsageError, match="'min' or 'max'"):
        module.PillionCheckpoint("x", mode="least")
    # At once, and not when the fit begins.
    with pytest.raises(SettingsError, match=r"did you mean trigger\.periodSteps"):
        module.PillionCheckpoint("x", policy={"periodSteps": 5})
    with pytest.raises(SettingsError, match="cannot hold a URL"):
        module.PillionCheckpoint(Path("s3://bucket/run-1"))
    with pytest.raises(UsageError, match="ModelParallelStrategy"):
        module._check_strategy(object())
    monkeypatch.setenv("PILLION_RUNTIME_DIR", "/run/pillion")
    with pytest.raises(UsageError, match="use the callback PillionCheckpoint"):
        module.PillionCheckpointIO()


def test_the_names_of_lightning_that_are_overridden_or_private_are_as_they_were(job: Any) -> None:
    """A release that changes one of them fails here, and not in somebody's training."""
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper, _DatasetSamplerWrapper
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.loops.fit_loop import _FitLoop
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
    from lightning.pytorch.plugins.io import CheckpointIO
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    def signature(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert {name: signature(getattr(_CheckpointConnector, name)) for name in ("dump_checkpoint", "restore_datamodule", "restore_model", "restore_callbacks", "restore_training_state")} == {
        "dump_checkpoint": ["self", "weights_only"],
        "restore_datamodule": ["self"],
        "restore_model": ["self"],
        "restore_callbacks": ["self"],
        "restore_training_state": ["self"],
    }  # fmt: skip
    assert "_loaded_checkpoint" in inspect.getsource(_CheckpointConnector.restore_training_state)
    assert signature(_FitLoop._load_combined_loader_states) == ["self"]
    setup = inspect.getsource(_FitLoop.setup_data)
    assert setup.index("self._load_combined_loader_states()") < setup.index("iter(self._data_fetcher)")
    assert '"combined_loader"' in inspect.getsource(_FitLoop.on_save_checkpoint)
    assert signature(_TrainingEpochLoop._should_check_val_fx) == ["self", "data_fetcher"]
    assert signature(_set_sampler_epoch) == ["dataloader", "epoch"]
    assert "self.dataset.reset()" in inspect.getsource(DistributedSamplerWrapper.__iter__)
    assert "list(self._sampler)" in inspect.getsource(_DatasetSamplerWrapper.reset)
    hooks = (
        "on_fit_start",
        "on_train_start",
        "on_train_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "teardown",
    )
    assert {name: signature(getattr(Callback, name)) for name in hooks} == {
        "on_fit_start": ["self", "trainer", "pl_module"],
        "on_train_start": ["self", "trainer", "pl_module"],
        "on_train_batch_end": ["self", "trainer", "pl_module", "outputs", "batch", "batch_idx"],
        "on_validation_end": ["self", "trainer", "pl_module"],
        "on_train_epoch_end": ["self", "trainer", "pl_module"],
        "teardown": ["self", "trainer", "pl_module", "stage"],
    }
    run = inspect.getsource(Trainer._run)
    order = ["strategy.setup(self)", '"on_fit_start"', "restore_checkpoint_after_setup:\n", "restore_training_state()"]
    places = [run.rindex(each) for each in order]
    assert places == sorted(places)
    for strategy in (SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy):
        assert signature(strategy.optimizer_state) == ["self", "optimizer"]
        assert signature(strategy.lightning_module_state_dict) == ["self"]
        assert signature(strategy.reduce_boolean_decision) == ["self", "decision", "all"]
    assert signature(CheckpointIO.save_checkpoint) == ["self", "checkpoint", "path", "storage_options"]
    assert signature(CheckpointIO.load_checkpoint) == ["self", "path", "map_location", "weights_only"]
    assert signature(CheckpointIO.remove_checkpoint) == ["self", "path"]


@pytest.mark.parametrize("kind", ["DataLoader", "StatefulDataLoader"])
def test_a_loader_without_a_position_is_warned_of(job: Any, ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """A resume within an epoch could not go on where it was, and nothing else would say so."""

    def body(_: Any) -> list[str]:
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("pillion.lightning").addHandler(handler)
        loaded_by = job.StatefulDataLoader if kind == "StatefulDataLoader" else torch.utils.data.DataLoader
        job.fit(tmp_path / "out", "auto", saving(tmp_path / "run"), epochs=1, loaded_by=loaded_by)
        return lines

    [lines] = run(ranks, body, 1)
    assert any("no state to save" in line for line in lines) == (kind == "DataLoader")
