"""
The whole of: `pillion.state`: a script that saves `app_state` and resumes from it is the script that was never interrupted.

Called from: pytest.
Must never: import a framework; their tests are a level of their own.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import pillion
from pillion import checkpointer
from pillion.state import AppState, PerRank, Rng, Whole, app_state
from process.ranks import Peer, Ranks
from support.deadlines import Deadline
from support.logs import heard

EPOCHS: Final = 3
BATCHES: Final = 4
MIDDLE: Final = 6
"""A step in the middle of the second epoch."""
BETWEEN: Final = 8
"""The last step of the second epoch."""
POLICY: Final[dict[str, Any]] = {"trigger": {"periodSteps": 100_000, "onTermination": "Skip"}}

Line = tuple[int, str, float]


class Loader:
    """A data loader with a state, which draws from torch's generator when its iterator is made, as torch's own does."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._order: list[int] = []
        self._done = 0
        self._finished = True

    def __iter__(self) -> Iterator[torch.Tensor]:
        drawn = torch.randperm(BATCHES).tolist()
        if self._finished:
            self._order, self._done, self._finished = drawn, 0, False
        return self._batches()

    def _batches(self) -> Iterator[torch.Tensor]:
        while self._done < BATCHES:
            self._done += 1
            yield torch.full((2, 4), 1.0 + self._order[self._done - 1] + 10 * self._rank) + torch.rand(2, 4)
        self._finished = True

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self._order), "done": self._done, "finished": self._finished}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order, self._done, self._finished = state["order"], state["done"], state["finished"]


class Log:
    """A log that grows, and so changes its structure."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines = state["lines"]


def train(peer: Peer, root: Path | None, *, until: int, save_at: int = 0, between: bool = False) -> dict[str, Any]:
    """
    A user's script. Returns the losses of its steps, its weights, and what it loaded.

    Args:
        root: of its checkpoints; None trains without Pillion.
        until: it ends after this step.
        save_at: the step that it saves.
        between: whether it saves behind its epoch, rather than in it.
    """
    torch.manual_seed(1 + peer.rank)
    random.seed(peer.rank)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.1)
    model: torch.nn.Module = DistributedDataParallel(net) if peer.world_size > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
    log, loader = Log(), Loader(peer.rank)
    state = app_state(model, optimizer, schedulers=schedule, dataloader=loader, log=Whole(log), step=0, epoch=0)
    opened = checkpointer.Checkpointer(root, policy=POLICY) if root is not None else None
    start = state.load(opened) if opened is not None else None
    losses: list[Line] = []
    while state["epoch"] < EPOCHS:
        for batch in state.batches():
            state["step"] += 1
            loss = model(batch).square().mean() * (1 + random.random())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append((state["step"], loss.item().hex(), optimizer.param_groups[0]["lr"]))
            log.lines.append({"step": state["step"], "loss": loss.item()})
            if state["step"] == save_at and not between and opened is not None:
                opened.save(state, save_at).result(Deadline.COMMITTED.s)
            if state["step"] == until and not between:
                break
        if state["step"] == until and not between:
            break
        state["epoch"] += 1
        if state["step"] == save_at and between and opened is not None:
            opened.save(state, save_at).result(Deadline.COMMITTED.s)
        if state["step"] == until:
            break
    tier = str(opened.last_load.tier) if opened is not None and opened.last_load is not None else ""
    if opened is not None and not peer.hear():
        opened.close()
    weights = {name: each.tolist() for name, each in net.state_dict().items()}
    return {"start": start, "tier": tier, "losses": losses, "weights": weights, "log": len(log.lines)}


@pytest.mark.parametrize(
    ("num_ranks", "save_at", "between"),
    [(1, MIDDLE, False), (1, BETWEEN, False), (1, BETWEEN, True), (2, MIDDLE, False)],
)
def test_an_interrupted_run_equals_one_that_was_not_and_one_without_pillion(
    ranks: Ranks, tmp_path: Path, num_ranks: int, save_at: int, between: bool
) -> None:
    """Losses, rates and weights, bit for bit: from memory after a crash, and from storage; saved in an epoch, at its end, and behind it."""
    every = EPOCHS * BATCHES
    without = ranks.start(lambda peer: train(peer, None, until=every), num_ranks=num_ranks).finish(Deadline.SCRIPT)
    root = tmp_path / "runs"

    def first(peer: Peer) -> object:
        return train(peer, root, until=save_at, save_at=save_at, between=between)

    crashed = ranks.start(first, num_ranks=num_ranks)
    crashed.say(True)  # it ends as by os._exit, and leaves its memory
    begun = crashed.finish(Deadline.SCRIPT)

    def second(peer: Peer) -> object:
        return train(peer, root, until=every)

    resumed = ranks.start(second, num_ranks=num_ranks, attempt=1)
    resumed.say(False)  # it ends cleanly, and its memory with it
    from_memory = resumed.finish(Deadline.SCRIPT)
    ranks.alone()
    again = ranks.start(second, num_ranks=num_ranks)
    again.say(False)
    from_storage = again.finish(Deadline.SCRIPT)
    for rank in range(num_ranks):
        assert begun[rank]["start"] is None
        for tier, resumption in (("arena", from_memory[rank]), ("storage", from_storage[rank])):
            assert (resumption["start"], resumption["tier"]) == (save_at, tier)
            assert begun[rank]["losses"] + resumption["losses"] == without[rank]["losses"], tier
            assert resumption["weights"] == without[rank]["weights"]
            assert resumption["log"] == without[rank]["log"] == every


def test_a_fresh_start_builds_nothing_and_an_optimizer_without_a_step_comes_back_without_one(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Neither a load of nothing, nor a save or a load before the first step, makes optimizer state or moves a group's values."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    groups = repr(optimizer.state_dict()["param_groups"])
    state = app_state(model, optimizer, rng=False)
    opened = ranks.open(tmp_path)
    assert state.load(opened) is None
    assert not optimizer.state
    opened.save(state, 1).result(Deadline.COMMITTED.s)
    assert not optimizer.state
    assert repr(optimizer.state_dict()["param_groups"]) == groups
    assert state.load(opened) == 1
    assert not optimizer.state
    assert [each.grad for each in model.parameters()] == [None, None]


def test_a_parameter_that_never_had_a_gradient_may_lack_its_state_and_no_other_may(
    ranks: Ranks, tmp_path: Path
) -> None:
    """An expert that nothing was routed to is restored without moments; the state of all parameters may not be lost, nor a weight."""

    def stepped(*parameters: torch.Tensor) -> None:
        for each in parameters:
            each.grad = torch.ones_like(each)
        optimizer.step()
        optimizer.zero_grad()

    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "idle": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(model.parameters())
    opened = ranks.open(tmp_path)
    plain = app_state(model, rng=False)
    opened.save(plain, 1).result(Deadline.COMMITTED.s)
    # Stepped in the forked children of other tests; here no backward pass may run, and none has to.
    used = list(model["used"].parameters())
    stepped(*used)
    opened.save(app_state(model, optimizer, rng=False), 2).result(Deadline.COMMITTED.s)

    optimizer = torch.optim.AdamW(model.parameters())
    state = app_state(model, optimizer, rng=False)
    assert state.load(opened) == 2
    assert [len(optimizer.state.get(each, {})) for each in model.parameters()] == [3, 3, 0, 0]
    with pytest.raises(pillion.IncompatibleCheckpoint, match="optimizer"):
        state.load(opened, 1)
    larger = torch.nn.ModuleDict({**dict(model.items()), "more": torch.nn.Linear(2, 2)})
    with pytest.raises(pillion.IncompatibleCheckpoint, match=r"model\.more"):
        app_state(larger, rng=False).load(opened)


def test_what_is_of_a_rank_comes_back_to_it_and_what_is_gone_is_named(ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks' values, from storage: two ranks have each its own; one has its own and hears of the other; three: the third keeps its own."""

    class Position:
        def __init__(self, at: int) -> None:
            self.at = at

        def state_dict(self) -> list[int]:
            return [self.at]

        def load_state_dict(self, state: list[int]) -> None:
            (self.at,) = state

    def saved(peer: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path / "runs") as opened:
            state = AppState(position=PerRank(Position(100 + peer.rank)), rng=Rng())
            opened.save(state, 1).result(Deadline.COMMITTED.s)

    def loaded(peer: Peer) -> tuple[int | None, int, tuple[int, ...], list[str]]:
        with heard() as lines, checkpointer.Checkpointer(tmp_path / "runs") as opened:
            position = Position(peer.rank)
            state = AppState(position=PerRank(position), rng=Rng())
            step = state.load(opened)
            if dist.is_initialized():
                dist.barrier()
            return step, position.at, state["position"].gone, lines

    ranks.start(saved, num_ranks=2).finish()
    ranks.alone()
    expected = {1: [(1, 100, (1,))], 2: [(1, 100, ()), (1, 101, ())], 3: [(1, 100, ()), (1, 101, ()), (1, 2, (2,))]}
    for world, values in expected.items():
        told = ranks.start(loaded, num_ranks=world).finish()
        assert [each[:3] for each in told] == values
        lines = ["\n".join(each[3]) for each in told]
        assert ("that of ranks 1 to 1 is gone" in lines[0]) == (world == 1)
        assert ("no Position of rank 2" in lines[-1]) == (world == 3)
        assert ("saved by 2 ranks" in lines[0]) == (world != 2)
        ranks.alone()


def test_what_app_state_cannot_take_is_refused_by_name() -> None:
    """A loader without a state, a name that is taken, an optimizer of another model's parameters, and batches of no loader."""
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.raises(pillion.UsageError, match="StatefulDataLoader"):
        app_state(model, dataloader=torch.utils.data.DataLoader([1]))  # type: ignore[arg-type] # a user's mistake
    with pytest.raises(pillion.UsageError, match=r"\['optimizer'\]"):
        app_state(model, torch.optim.SGD(model.parameters()), optimizer=1)
    with pytest.raises(pillion.UsageError, match="parameter that is not the model's"):
        app_state(model, torch.optim.SGD(other.parameters(), momentum=0.9))["optimizer"].state_dict()
    with pytest.raises(pillion.UsageError, match="dataloader="):
        next(app_state(model).batches())
