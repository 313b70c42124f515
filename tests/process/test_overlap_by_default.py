"""
The whole of: saves of a usual training loop that does not mention overlap: each holds the state of its moment, bit for bit, although most of
it is copied behind the next forward and backward passes.

Called from: pytest.
Must never: run a backward pass in this process (see process.ranks); the trainers are forked.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from pillion import checkpointer, late, staging
from pillion.handle import SaveHandle
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

WIDTH = 160
"""A square matrix of it has more than late.SMALL_LEAF_BYTES."""
STEPS = 5


@pytest.fixture(autouse=True)
def small_states_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inherited by the forked trainers."""
    monkeypatch.setattr(late, "USUAL_MIN_BYTES", 1)
    monkeypatch.setattr(late, "USUAL_MIN_MEAN_BYTES", 1)


class Model(torch.nn.Module):
    """Two layers, tied to one another, with the buffers of a batch norm that each forward pass changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.last = torch.nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight
        self.register_buffer("seen", torch.zeros(WIDTH, WIDTH))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.seen, torch.Tensor)
        self.seen += 1
        hidden: torch.Tensor = self.last(torch.relu(self.norm(self.first(batch))))
        return hidden


class HeldCopies:
    """Holds each copy that runs beside the training, until it is let go: then all that comes before was not waited for."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.held = 0
        copy_in = staging.SegmentMapping.copy_in

        def held(mapping: staging.SegmentMapping, *args: Any, **more: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.held += 1
                assert self.let_go.wait(Deadline.STAGED.s)
            copy_in(mapping, *args, **more)

        # In a forked child, which ends with the test.
        setattr(staging.SegmentMapping, "copy_in", held)  # noqa: B010 # mypy knows the method's own signature


def bits(value: Any) -> Any:
    """Tensors as bytes: NaN equals itself, and -0.0 is not 0.0."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, Mapping):
        return {str(key): bits(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [bits(each) for each in value]
    return value


def state_of(model: Model, average: AveragedModel, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    moments = {
        f"{number}.{index}": {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for number, optimizer in enumerate(optimizers)
        for index, state in enumerate(optimizer.state.values())
    }
    return {"model": model.state_dict(), "average": average.state_dict(), "moments": moments}


Parameters = list[torch.nn.Parameter]


def adamw(parameters: Parameters, **more: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, **more)]


OPTIMIZERS: dict[str, Callable[[Parameters], list[torch.optim.Optimizer]]] = {
    "adamw": lambda parameters: adamw(parameters, foreach=False, fused=False),
    "foreach": lambda parameters: adamw(parameters, foreach=True),
    "fused": lambda parameters: adamw(parameters, fused=True),
    "momentum": lambda parameters: [torch.optim.SGD(parameters, lr=0.01, momentum=0.9)],
    "two": lambda parameters: [*adamw(parameters[:1]), torch.optim.SGD(parameters[1:], lr=0.01, momentum=0.9)],
}


def trained(
    opened: checkpointer.Checkpointer,
    optimizer_of: Callable[[Parameters], list[torch.optim.Optimizer]],
    *,
    micro_batches: int = 1,
    skipped: Sequence[int] = (),
    behind_a_save: Callable[[Model], None] = lambda model: None,
) -> list[bool]:
    """
    Trains, saves behind each step and changes everything before the copy, and compares each checkpoint with a copy of its moment.

    Returns: for each save whether it was copied beside the training.
    """
    torch.manual_seed(0)
    copies = HeldCopies()
    model = Model()
    average = AveragedModel(model, use_buffers=True)
    optimizers = optimizer_of(list(model.parameters()))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    overlapped, handle, wanted = [], None, None
    for step in range(1, STEPS + 1):
        for _ in range(micro_batches):
            loss = model(torch.randn(8, WIDTH)).square().mean() / micro_batches
            scaler.scale(loss).backward()
        average.update_parameters(model)  # in place, while the weights of the save before are not copied yet
        if step in skipped:
            next(model.parameters()).grad = torch.full((WIDTH, WIDTH), float("inf"))
        copies.let_go.set()
        for optimizer in optimizers:
            if skipped:
                scaler.step(optimizer)
            else:
                scaler.unscale_(optimizer)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        if handle is not None:
            assert_holds(opened, handle, wanted)
        copies.let_go.clear()
        before = copies.held
        state = state_of(model, average, optimizers)
        handle, wanted = opened.save(state, step), bits(copy.deepcopy(state))
        overlapped.append(not handle.staged.done())
        behind_a_save(model)
        assert copies.held - before <= 1
    copies.let_go.set()
    assert handle is not None
    assert_holds(opened, handle, wanted)
    return overlapped


def assert_holds(opened: checkpointer.Checkpointer, handle: SaveHandle, wanted: Any) -> None:
    handle.result(Deadline.COMMITTED.s)
    found = bits(opened.read(handle.step))
    for part in wanted:
        assert found[part].keys() == {name for name, value in wanted[part].items() if value != {}}
        for name, value in found[part].items():
            assert value == wanted[part][name], f"step {handle.step}: {part}.{name} is not what was saved"


def in_a_trainer(ranks: Ranks, root: Path, body: Callable[[checkpointer.Checkpointer], list[bool]]) -> list[bool]:
    """What `body` returned in a forked trainer. Blocks: up to Deadline.SCRIPT."""

    def run(_: Peer) -> list[bool]:
        with checkpointer.Checkpointer(root, policy={"retention": {"keepLast": STEPS}}) as opened:
            return body(opened)

    found: list[bool] = ranks.start(run)[0].hear(Deadline.SCRIPT)
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_each_save_holds_the_state_of_its_moment_bit_for_bit(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """
    Tied weights, moments, the statistics of a batch norm, a large buffer and an average, under every kind of step: the first save is copied
    at once, each later one beside the next passes.
    """
    found = in_a_trainer(ranks, tmp_path, lambda opened: trained(opened, OPTIMIZERS[kind]))
    assert found == [False, True, True, True, True]


def test_gradient_accumulation_runs_on_beside_one_copy(ranks: Ranks, tmp_path: Path) -> None:
    """Three passes before each step, all of them before the copy: the checkpoint is the one of the save."""
    found = in_a_trainer(ranks, tmp_path, lambda opened: trained(opened, OPTIMIZERS["adamw"], micro_batches=3))
    assert found == [False, True, True, True, True]


def test_a_step_that_a_grad_scaler_skips_changes_nothing_and_a_save_behind_it_is_copied_at_once(
    ranks: Ranks, tmp_path: Path
) -> None:
    """Infinite gradients at step 3: no optimizer steps, so the save behind it does not wait for a step that may not come."""
    found = in_a_trainer(ranks, tmp_path, lambda opened: trained(opened, OPTIMIZERS["adamw"], skipped=[3]))
    assert found == [False, True, False, True, True]


def clip_by_data(model: Model) -> None:
    model.first.weight.data.clamp_(-0.05, 0.05)


def clip_in_place(model: Model) -> None:
    with torch.no_grad():
        model.first.weight.clamp_(-0.05, 0.05)


@pytest.mark.parametrize("clip", [clip_by_data, clip_in_place])
def test_weights_that_are_clipped_behind_a_save_are_never_copied_late(
    ranks: Ranks, tmp_path: Path, clip: Callable[[Model], None]
) -> None:
    """A loop that clips a weight behind each save loses no save, and none is torn: that weight is copied at once, the rest later."""
    found = in_a_trainer(ranks, tmp_path, lambda opened: trained(opened, OPTIMIZERS["adamw"], behind_a_save=clip))
    assert found == [False, True, True, True, True]
