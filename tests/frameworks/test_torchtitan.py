"""
torchtitan's trainer with `PillionCheckpointManager`: the same training as without it, and as without a break.

Called from: pytest. torchtitan is imported once, in this process; each run is forked from it.
"""

import dataclasses
import inspect
import json
import os
import re
import signal
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.distributed import checkpoint as stock

from pillion.errors import IncompatibleCheckpoint, UsageError
from process.ranks import Ranks
from support.deadlines import Deadline

STEPS: Final = 8
KILLS: Final = (4, 6)
"""Steps behind which a run is killed, before it saves them."""


@pytest.fixture(scope="module")
def titan(warm: None) -> Any:
    """torchtitan, imported before any test forks."""
    from frameworks import titan_job

    return titan_job


@pytest.fixture(scope="module")
def assets(titan: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return titan.make_assets(tmp_path_factory.mktemp("titan") / "assets")  # type: ignore[no-any-return] # imported late


def pillion(titan: Any, **fields: Any) -> Any:
    return titan.PillionCheckpointManager.Config(
        **{"enable": True, "interval": 5, "snapshot_interval": 1, "last_save_model_only": False} | fields
    )


def run(ranks: Ranks, body: Any, num_ranks: int, **env: str) -> list[dict[str, Any]]:
    return ranks.start(body, num_ranks=num_ranks, env=env).finish(Deadline.SCRIPT)


def killed(ranks: Ranks, body: Any, num_ranks: int, out: Path, status: int) -> list[dict[str, Any]]:
    """Run until every rank has ended itself as if killed, and return what each had by then."""
    job = ranks.start(body, num_ranks=num_ranks)
    for trainer in job.trainers:
        with pytest.raises(AssertionError, match=f"ended with {status}"):
            trainer.hear(Deadline.SCRIPT)
    return [json.loads((out / f"killed.{rank}").read_text()) for rank in range(num_ranks)]


def part(told: dict[str, Any], key: str, after: int, upto: int) -> dict[int, Any]:
    return {int(step): value for step, value in told[key].items() if after < int(step) <= upto}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_that_is_killed_twice_equals_one_without_pillion(
    titan: Any, assets: Path, ranks: Ranks, tmp_path: Path, num_ranks: int
) -> None:
    """Losses, weights, optimizer and random numbers, bit for bit: until the first kill, from memory, and then from storage."""
    plain = run(ranks, titan.trains(tmp_path / "plain", assets, titan.off(), steps=STEPS), num_ranks)

    out, config = tmp_path / "run", pillion(titan)
    first, second = (
        killed(ranks, titan.trains(out, assets, config, steps=STEPS, kill_after=kill), num_ranks, out, titan.KILLED)
        for kill in KILLS
    )
    os.kill(ranks.sidecar(), signal.SIGTERM)  # it brings its newest snapshot to storage, and takes the arena with it
    ranks.alone()
    third = run(ranks, titan.trains(out, assets, config, steps=STEPS), num_ranks)

    for rank in range(num_ranks):
        for key in ("losses", "random"):
            assert part(first[rank], key, 0, KILLS[0]) == part(plain[rank], key, 0, KILLS[0])
            assert part(second[rank], key, KILLS[0] - 1, KILLS[1]) == part(plain[rank], key, KILLS[0] - 1, KILLS[1])
            assert part(third[rank], key, KILLS[1] - 1, STEPS) == part(plain[rank], key, KILLS[1] - 1, STEPS)
        assert min(map(int, second[rank]["losses"])) == KILLS[0]
        assert (second[rank]["tier"], second[rank]["from"]) == ("arena", KILLS[0] - 1)
        assert (third[rank]["tier"], third[rank]["from"]) == ("storage", KILLS[1] - 1)
        assert (third[rank]["weights"], third[rank]["optimizer"]) == (plain[rank]["weights"], plain[rank]["optimizer"])

    if num_ranks == 2:
        stock_config = titan.CheckpointManager.Config(enable=True, interval=100, last_save_model_only=False)
        own = run(ranks, titan.trains(out, assets, stock_config, steps=STEPS), num_ranks)
        for rank in range(num_ranks):
            assert own[rank]["weights"] == plain[rank]["weights"], "torchtitan's own manager reads what Pillion wrote"
            assert own[rank]["optimizer"] == plain[rank]["optimizer"]
            assert not own[rank]["losses"]


class Spy:
    """A part of a training with a state, that notes what it is asked."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.calls: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        self.value = state_dict["value"]


KEYS: Final = ("optimizer", "dataloader", "lr_scheduler", "train_state")


def small(titan: Any, root: Path, value: int, **fields: Any) -> Any:
    """A manager as torchtitan makes it, of a model and of parts that are all at `value`."""
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    torch.nn.init.constant_(model.bias, value)
    return pillion(titan, folder="own", **{"interval": 100, "snapshot_interval": None} | fields).build(
        dataloader=Spy(value),
        model_parts=[model],
        optimizers=Spy(value),
        lr_schedulers=Spy(value),
        states={"train_state": Spy(value)},
        sd_adapter=None,
        base_folder=str(root),
    )


def values(manager: Any) -> dict[str, int]:
    """What a manager's parts are at now."""
    model = manager.states["model"].state_dict()
    assert len({float(value) for tensor in model.values() for value in tensor.flatten()}) == 1
    return {"model": int(model["weight"][0, 0])} | {key: manager.states[key].value for key in KEYS}


def at(value: int, **others: int) -> dict[str, int]:
    return dict.fromkeys(("model", *KEYS), value) | others


def stored(path: Path) -> dict[str, str]:
    """FQN -> dtype of the tensors of a checkpoint, as stock DCP reads it."""
    metadata = stock.FileSystemReader(path).read_metadata().state_dict_metadata
    return {fqn: str(entry.properties.dtype) for fqn, entry in metadata.items() if hasattr(entry, "properties")}


def test_a_load_asks_each_part_once_and_a_fresh_start_asks_none(titan: Any, ranks: Ranks, tmp_path: Path) -> None:
    """A second `state_dict` would make a data loader begin again; the first of an optimizer makes it step."""

    def body(_: Any) -> None:
        fresh = small(titan, tmp_path, 1, interval=1)
        assert fresh.load() is False
        assert [fresh.states[key].calls for key in KEYS] == [[]] * len(KEYS)
        assert fresh.save(1)
        assert [fresh.states[key].calls for key in KEYS] == [["state_dict"]] * len(KEYS)
        fresh.close()
        again = small(titan, tmp_path, 2, interval=1)
        assert again.load() is True
        assert [again.states[key].calls for key in KEYS] == [["state_dict", "load_state_dict"]] * len(KEYS)
        assert values(again) == at(1)
        again.close()

    ranks.start(body).finish()


def test_each_field_of_the_config_decides_what_is_saved_and_loaded(titan: Any, ranks: Ranks, tmp_path: Path) -> None:
    """What is saved at the first, at a due and at the last step; and what a load takes: a step, a part, another run's model."""

    def body(_: Any) -> None:
        first = small(titan, tmp_path, 1, interval=4, enable_first_step_checkpoint=True)
        assert [first.save(step) for step in range(1, 6)] == [True, False, False, True, False]
        first.states["train_state"].value = 6
        assert first.save(6, last_step=True)
        first.maybe_wait_for_staging()
        first.maybe_wait_for_saving()
        first.close()
        own = tmp_path / "own"
        assert sorted(path.name for path in own.glob("step-*")) == ["step-1", "step-4", "step-6"]

        older = small(titan, tmp_path, 2, load_only=True)
        assert older.load(4)
        assert values(older) == at(1)
        assert not older.save(7, last_step=True)
        older.close()
        partly = small(titan, tmp_path, 3, exclude_from_loading=["dataloader", "optimizer"])
        assert partly.load()
        assert values(partly) == at(1, dataloader=3, optimizer=3, train_state=6)
        partly.close()

        other = tmp_path / "other"
        begun = small(titan, other, 4, initial_load_path=str(own / "step-6"))
        assert begun.load()
        assert values(begun) == at(4, model=1)
        begun.close()
        whole = small(
            titan, other, 5, initial_load_path=str(own / "step-6"), initial_load_model_only=False, keep_latest_k=2
        )
        assert whole.load()
        assert values(whole) == at(1, train_state=6)
        whole.close()

        ended = small(titan, tmp_path / "ended", 6, last_save_model_only=True, export_dtype="bfloat16")
        assert ended.save(9, last_step=True)
        ended.close()
        assert stored(tmp_path / "ended/own/step-9") == {"weight": "torch.bfloat16", "bias": "torch.bfloat16"}
        gone_on = small(titan, tmp_path / "ended", 7)
        with pytest.raises(IncompatibleCheckpoint) as caught:
            gone_on.load()
        assert "last_save_model_only" in caught.value.__notes__[0]
        gone_on.close()

        seed = small(titan, tmp_path / "seed", 8, last_save_model_only=True)
        assert seed.save(0, last_step=True)
        seed.close()
        grown = small(titan, tmp_path / "seed", 9)
        assert grown.load()
        assert values(grown) == at(9, model=8)
        grown.close()

    ranks.start(body).finish(Deadline.SCRIPT)


def test_retention_is_the_configs_without_a_policy(titan: Any, ranks: Ranks, tmp_path: Path) -> None:
    """`keep_latest_k` is Pillion's `keepLast`; no thread of torchtitan's removes anything."""

    def body(_: Any) -> None:
        manager = small(titan, tmp_path, 1, interval=1, keep_latest_k=2)
        for step in range(1, 5):
            manager.save(step)
            manager.maybe_wait_for_saving()
        manager.close()

    ranks.start(body).finish()
    assert sorted(path.name for path in (tmp_path / "own").glob("step-*")) == ["step-3", "step-4"]


def test_what_is_not_possible_is_refused_by_name(titan: Any, tmp_path: Path) -> None:
    """Each refusal names the field and what to do instead, before anything starts."""
    with pytest.raises(UsageError, match=r"last_save_in_hf .* convert_to_hf\.py"):
        small(titan, tmp_path, 1, last_save_in_hf=True, last_save_model_only=True)
    with pytest.raises(ValueError, match="snapshot_interval is 0"):
        pillion(titan, snapshot_interval=0)
    assert small(titan, tmp_path, 1, enable=False).load() is False


def test_the_lines_of_the_guide_take_a_config_as_it_is_and_keep_its_fields(
    titan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that keep the fields, on a config of torchtitan's own registry; its `interval` of 10 takes no snapshot_interval of 10."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "frameworks.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page.partition("## torchtitan")[2], flags=re.MULTILINE | re.DOTALL)
    plain, keeping = blocks[:2]
    config = titan.llama3_debugmodel()
    before = {each.name: getattr(config.checkpoint, each.name) for each in dataclasses.fields(config.checkpoint)}
    assert before.pop("async_mode") == "disabled"
    assert (before["interval"], before["last_save_model_only"]) == (10, False)
    exec(keeping, {"config": config})
    assert isinstance(config.checkpoint, titan.PillionCheckpointManager.Config)
    changed = {"enable": True, "snapshot_interval": 5, "overlap": True, "policy": None}
    assert dataclasses.asdict(config.checkpoint) == before | changed
    exec(plain, {"config": config})
    assert (config.checkpoint.interval, config.checkpoint.last_save_model_only) == (500, True)
    with pytest.raises(ValueError, match="less than interval, which is 10"):
        titan.PillionCheckpointManager.Config(enable=True, interval=10, snapshot_interval=10)
    monkeypatch.setenv("PILLION_POLICY", "policy.yaml")
    assert titan.PillionCheckpointManager.Config(enable=True, interval=10, snapshot_interval=10).snapshot_interval == 10


def test_the_names_of_torchtitan_that_are_overridden_or_private_are_as_they_were(titan: Any) -> None:
    """A release that changes one of them fails here, and not in somebody's training."""
    from torchdata.stateful_dataloader import StatefulDataLoader
    from torchtitan.components.checkpointer import base, dcp
    from torchtitan.config import TORCH_DTYPE_MAP

    def signature(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    public = {name: signature(value) for name, value in vars(base.BaseCheckpointManager).items() if name[0] != "_"}
    public.pop("Config")
    assert public == {
        "load": ["self", "step"],
        "save": ["self", "curr_step", "last_step"],
        "maybe_wait_for_staging": ["self"],
        "maybe_wait_for_saving": ["self"],
        "close": ["self"],
    }
    for name, parameters in public.items():
        assert signature(getattr(titan.PillionCheckpointManager, name)) == parameters
    assert signature(titan.PillionCheckpointManager.__init__) == signature(dcp.CheckpointManager.__init__)
    assert {field.name for field in dataclasses.fields(base.BaseCheckpointManager.Config)} == {
        "enable", "folder", "interval", "initial_load_path", "initial_load_model_only", "initial_load_in_hf",
        "initial_load_in_hf_quantized", "last_save_model_only", "last_save_in_hf", "export_dtype", "keep_latest_k",
        "load_step", "exclude_from_loading", "enable_first_step_checkpoint", "create_seed_checkpoint", "load_only",
    }  # fmt: skip
    assert signature(base.ModelWrapper.state_dict) == ["self"]
    assert signature(base.ModelWrapper.load_state_dict) == ["self", "state_dict"]
    assert TORCH_DTYPE_MAP["bfloat16"] is torch.bfloat16
    assert signature(StatefulDataLoader._get_iterator) == ["self"]
    assert "self._get_iterator()" in inspect.getsource(StatefulDataLoader.__iter__)
