"""
The whole of: a Trainer of Transformers with Pillion that is killed and resumes is the Trainer that was never interrupted.

Called from: pytest, in the environment that has Transformers.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from torch.distributed.tensor import DTensor

import pillion
from frameworks import cpu_fsdp, losses
from pillion import checkpointer
from pillion.transformers import PillionTrainer, resume_step
from pillion.wire.load_messages import Tier
from process.ranks import Peer, Ranks, committed
from support.deadlines import Deadline
from support.logs import heard
from support.processes import Processes

STEPS_IN_EPOCH: Final = 6
EPOCHS: Final = 2
KILLED_AT: Final = 9
POLICY: Final[dict[str, Any]] = {"trigger": {"periodSteps": 4, "snapshotSteps": 1, "onTermination": "Skip"}}
NEWEST: Final = {"arena": 8, "storage": 4}
"""The step that a run which was killed resumes from. Storage is asked after steps behind it were removed."""


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Token ids that depend on the row."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class Tell(transformers.TrainerCallback):  # type: ignore[misc] # the types are checked without Transformers
    """Writes each loss, and kills the process behind a step."""

    def __init__(self, folder: Path, rank: int, kill_at: int) -> None:
        self.folder, self.rank, self.kill_at = folder, rank, kill_at

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            losses.note(self.folder, self.rank, state.global_step, logs["loss"])
            if state.global_step == self.kill_at:
                os._exit(7)


def arguments(output: Path, **more: Any) -> Any:
    return transformers.TrainingArguments(
        str(output),
        **{
            "per_device_train_batch_size": 2,
            "num_train_epochs": EPOCHS,
            "logging_steps": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 5,
        }
        | more,
    )


def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            attention_dropout=0.1,
        )
    )


def run(
    peer: Peer,
    folder: Path,
    root: Path | None,
    *,
    kill_at: int = -1,
    resume: bool = False,
    shards: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A user's script, with Pillion if there is a root. With `shards` it has FSDP2 rather than DDP."""
    folder.mkdir(exist_ok=True)
    if shards:
        cpu_fsdp.allow()
        more["fsdp"], more["fsdp_config"] = True, {"version": 2}
    common = {
        "model": model(),
        "args": arguments(folder / "output", **more),
        "train_dataset": Rows(2 * STEPS_IN_EPOCH * peer.world_size),
        "callbacks": [Tell(folder, peer.rank, kill_at)],
    }
    told: tuple[int | None, str | None]
    if root is None:
        trainer = transformers.Trainer(**common)
        trainer.train()
        told = (None, None)
    else:
        opened = checkpointer.Checkpointer(root, policy=POLICY)
        trainer = PillionTrainer(**common, checkpointer=opened)
        found = resume_step(trainer)
        trainer.train(resume_from_checkpoint=resume)
        report = opened.last_load
        told = (found, None if report is None else str(report.tier))
        opened.close()
    assert shards == any(isinstance(each, DTensor) for each in trainer.model.parameters())
    losses.note_weights(folder, peer.rank, trainer.accelerator.unwrap_model(trainer.model).state_dict())
    return {"found": told, "log": len(trainer.state.log_history), "step": trainer.state.global_step}


@pytest.mark.parametrize(("num_ranks", "shards"), [(1, False), (2, False), (2, True)])
def test_a_killed_trainer_resumes_as_the_one_without_pillion_went_on(
    ranks: Ranks, tmp_path: Path, num_ranks: int, shards: bool
) -> None:
    """
    Losses and weights, bit for bit: from memory in the middle of an epoch, and from storage in another one; with one process, DDP, FSDP2.
    """
    script = functools.partial(run, shards=shards)
    root = tmp_path / "runs"
    whole, first = tmp_path / "whole", tmp_path / "first"
    ranks.start(lambda peer: script(peer, whole, None), num_ranks=num_ranks).finish(Deadline.SCRIPT)
    killed = ranks.start(lambda peer: script(peer, first, root, kill_at=KILLED_AT), num_ranks=num_ranks)
    assert [killed[rank].wait(Deadline.SCRIPT) for rank in range(num_ranks)] == [7] * num_ranks
    for tier, step in NEWEST.items():
        second = tmp_path / tier
        if tier == "storage":
            ranks.alone()
            for later in range(step + 1, STEPS_IN_EPOCH * EPOCHS + 1):
                shutil.rmtree(root / f"step-{later}", ignore_errors=True)
        job = ranks.start(functools.partial(resumed, second, root, shards), num_ranks=num_ranks, attempt=1)
        assert [each["found"] for each in job.finish(Deadline.SCRIPT)] == [(step, tier)] * num_ranks
        losses.assert_equal(whole, first, second, ranks=num_ranks, killed_at=KILLED_AT, resumed_from=step)


def resumed(folder: Path, root: Path, shards: bool, peer: Peer) -> dict[str, Any]:
    return run(peer, folder, root, resume=True, shards=shards)


def test_a_resumed_trainer_loads_once_and_in_this_order(ranks: Ranks, tmp_path: Path) -> None:
    """The state of the trainer first; everything else when the optimizer exists; the generators when the epoch's iterator does."""

    def recorded(peer: Peer) -> list[str]:
        calls: list[str] = []

        class Spy(PillionTrainer):
            def _load_from_checkpoint(self, *args: Any) -> None:
                calls.append("weights")
                super()._load_from_checkpoint(*args)

            def create_optimizer(self, *args: Any) -> Any:
                calls.append("optimizer made")
                return super().create_optimizer(*args)

            def _load_optimizer_and_scheduler(self, *args: Any) -> None:
                calls.append("optimizer")
                super()._load_optimizer_and_scheduler(*args)

            def get_batch_samples(self, *args: Any) -> Any:
                calls.append("batches")
                return super().get_batch_samples(*args)

            def _load_rng_state(self, *args: Any) -> None:
                calls.append("generators")
                super()._load_rng_state(*args)

        class Told(checkpointer.Checkpointer):
            def find(self, *args: Any, **kwargs: Any) -> Any:
                calls.append("find")
                return super().find(*args, **kwargs)

            def read(self, *args: Any, **kwargs: Any) -> Any:
                calls.append(f"read {kwargs['prefix']}")
                return super().read(*args, **kwargs)

            def load(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
                calls.append(f"load {' '.join(sorted(state_dict))}")
                return super().load(state_dict, *args, **kwargs)

        with Told(tmp_path / "runs", policy=POLICY) as opened:
            for max_steps, resume in ((3, False), (5, True)):
                calls.clear()
                args = arguments(tmp_path / "output", max_steps=max_steps, save_strategy="steps", save_steps=3)
                trainer = Spy(model=model(), args=args, train_dataset=Rows(12), checkpointer=opened)
                trainer.train(resume_from_checkpoint=resume)
        return calls

    calls = ranks.start(recorded).finish(Deadline.SCRIPT)[0]
    assert calls[:7] == [
        "find",
        "read trainer",
        "weights",
        "optimizer made",
        "optimizer",
        "load model optimizer rng scheduler trainer",
        "batches",
    ]
    assert calls[7:9] == ["generators", "batches"]
    assert calls.count("generators") == 1


def test_the_trainers_strategy_and_the_policy_both_ask_for_saves(ranks: Ranks, tmp_path: Path) -> None:
    """What the strategy asks for goes to storage, also where the policy wants a snapshot of that step, and at the end of an epoch."""

    def saved(peer: Peer, strategy: str) -> list[int]:
        policy = {"trigger": {"periodSteps": 100, "snapshotSteps": 2, "onTermination": "Skip"}}
        args = arguments(tmp_path / f"output-{strategy}", save_strategy=strategy, save_steps=4)
        with checkpointer.Checkpointer(tmp_path / strategy, policy=policy) as opened:
            trainer = PillionTrainer(model=model(), args=args, train_dataset=Rows(12), checkpointer=opened)
            trainer.train()
            assert opened.find() == pillion.Found(step=12, tier=Tier.ARENA, path=None)
        return committed(tmp_path / strategy)

    for strategy, steps in (("steps", [4, 8, 12]), ("epoch", [6, 12])):
        assert ranks.start(lambda peer, of=strategy: saved(peer, of)).finish(Deadline.SCRIPT) == [steps]  # type: ignore[misc] # a default
        assert not (tmp_path / f"output-{strategy}").exists() or not list(
            (tmp_path / f"output-{strategy}").glob("checkpoint-*")
        )


class Judged(PillionTrainer):
    """Its evaluation gets better until step 4, and worse from there on."""

    control: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_distance": float(abs(self.state.global_step - 4)), "eval_note": "no number"}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics  # type: ignore[return-value] # as an evaluation of a user may


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_step_is_kept_and_its_weights_are_there_at_the_end_also_after_a_resume(
    ranks: Ranks, tmp_path: Path, strategy: str
) -> None:
    """The metric is in the manifest, retention keeps the best checkpoint beside the newest, and the end loads its weights."""
    output = tmp_path / "output"

    class Noting(transformers.TrainerCallback):  # type: ignore[misc] # as above
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                losses.note_weights(tmp_path, 0, kwargs["model"].state_dict())

    def trained(peer: Peer, kill_at: int) -> dict[str, Any]:
        told = arguments(
            output,
            save_strategy=strategy,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="distance",
            greater_is_better=False,
        )
        callbacks = [Noting(), Tell(tmp_path, peer.rank, kill_at)]
        trainer = Judged(model=model(), args=told, train_dataset=Rows(12), eval_dataset=Rows(2), callbacks=callbacks)
        trainer.train(resume_from_checkpoint=True)
        best, now = torch.load(tmp_path / "weights.0.pt"), trainer.model.state_dict()
        same = all(torch.equal(best[name], now[name]) for name in best)
        trainer.checkpointer.close()
        return {"same": same, "best": trainer.state.best_model_checkpoint, "step": trainer.state.global_step}

    assert ranks.start(lambda peer: trained(peer, 7))[0].wait(Deadline.SCRIPT) == 7
    told = ranks.start(lambda peer: trained(peer, -1), attempt=1).finish(Deadline.SCRIPT)
    assert told == [{"same": True, "best": str(output / "step-4"), "step": 12}]
    assert committed(output) == ([4, 12] if strategy == "steps" else [4])
    manifest = json.loads((output / "step-4" / "pillion-manifest.json").read_text())
    assert manifest["metrics"] == {"eval_distance": 0.0}


def test_a_run_that_begins_anew_beside_a_checkpoint_says_so_and_one_without_any_begins(
    ranks: Ranks, tmp_path: Path
) -> None:
    """`resume_from_checkpoint=True` is right from the first start on; without it a warning names the checkpoint that is passed over."""

    def trained(peer: Peer) -> list[Any]:
        told = []
        for resume in (True, False, True):
            args = arguments(tmp_path / "output", max_steps=2, save_strategy="steps", save_steps=2)
            trainer = PillionTrainer(model=model(), args=args, train_dataset=Rows(12))
            with heard() as lines, trainer.checkpointer:
                before = resume_step(trainer)
                trainer.train(resume_from_checkpoint=resume)
            told.append((before, any("begins anew, though there is a checkpoint of step 2" in line for line in lines)))
        return told

    assert ranks.start(trained).finish(Deadline.SCRIPT) == [[(None, False), (2, True), (2, False)]]


@pytest.mark.parametrize(
    ("arguments_of", "names"),
    [
        ({"save_only_model": True}, "save_model"),
        ({"push_to_hub": True, "hub_strategy": "every_save", "hub_token": "x"}, "hub_strategy to 'end'"),
        ({"enable_jit_checkpoint": True}, "onTermination"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments_of: dict[str, Any], names: str
) -> None:
    """The error says what does it instead, before anything is written."""
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda self: None)  # which asks a server
    args = arguments(tmp_path / "output", **arguments_of)
    with pytest.raises(pillion.UsageError, match=names):
        PillionTrainer(model=model(), args=args, train_dataset=Rows(12), eval_dataset=Rows(2))


def test_train_resumes_from_a_path_of_a_trainer_or_of_another_run_and_refuses_others(
    ranks: Ranks, tmp_path: Path
) -> None:
    """The Trainer's own directory, and another run's root; not a path without a checkpoint, and no hyperparameter search."""

    def refused(peer: Peer) -> list[int]:
        args = arguments(tmp_path / "output", max_steps=4, save_strategy="steps", save_steps=3)
        transformers.Trainer(model=model(), args=args, train_dataset=Rows(12)).train()
        with checkpointer.Checkpointer(tmp_path / "runs") as opened:
            trainer = PillionTrainer(model=model(), args=args, train_dataset=Rows(12), checkpointer=opened)
            with pytest.raises(pillion.UsageError, match="neither of Pillion nor of a Trainer"):
                trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "runs"))
            with pytest.raises(pillion.UsageError, match="search"):
                trainer.train(trial={"lr": 1})
            trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-3"))
            begun = [int(trainer._initial_global_step)]
        with checkpointer.Checkpointer(tmp_path / "next") as opened:
            args = arguments(tmp_path / "output", max_steps=6)
            trainer = PillionTrainer(model=model(), args=args, train_dataset=Rows(12), checkpointer=opened)
            trainer.train(resume_from_checkpoint=str(tmp_path / "runs"))
            return [*begun, int(trainer._initial_global_step), int(trainer.state.global_step)]

    assert ranks.start(refused).finish(Deadline.SCRIPT) == [[3, 4, 6]]


ENV_OF_JOBS: Final = {"PYTHONPATH": str(Path(__file__).parents[1]), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Each attempt has a store of its own: torchrun's outlives a restart, with gloo's addresses of the dead in it."""
SCRIPT: Final = """
import os, sys
from pathlib import Path
from frameworks.test_transformers import Rows, Tell, arguments, model
from pillion.transformers import PillionTrainer  # 1: the import

folder = Path(sys.argv[1])
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
args = arguments(folder / "output", save_strategy="steps", save_steps=4, ddp_backend="gloo")
tell = Tell(folder, int(os.environ["RANK"]), 9 if first else -1)
trainer = PillionTrainer(model=model(), args=args, train_dataset=Rows(24), callbacks=[tell])  # 2: the class
trainer.train(resume_from_checkpoint=True)  # 3: resume
print("resumed from", trainer.checkpointer.last_load)
"""


def test_the_lines_of_the_guide_survive_a_crash_under_torchrun(
    processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Two ranks that end by os._exit; torchrun starts them again, and they resume from what was saved, in the guide's three lines."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    job = processes.torchrun(script, tmp_path, num_ranks=2, max_restarts=1, env=ENV_OF_JOBS)
    job.check(Deadline.TORCHRUN)
    for rank in range(2):
        lines = losses.of(tmp_path, rank)
        assert [step for step, _ in lines] == [*range(1, 10), *range(9, 13)]
        assert lines[8] == lines[9]
    assert "resumed from LoadReport(step=8" in job.stdout
    ranks.alone()
