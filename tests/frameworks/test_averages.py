"""
The whole of: moving averages of the weights (EMA), torch's and one of the script's own, beside saves that overlap the training.

Called from: pytest, in the environment that has torchdata.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.optim import swa_utils

from frameworks import interrupted, own_script
from frameworks.own_script import Parts
from pillion import checkpointer, late
from process.ranks import Peer, Ranks
from process.test_overlap_by_default import HeldCopies
from support.deadlines import Deadline

DECAY: Final = 0.9
SAVES: Final = 5

Average = tuple[Any, Callable[[], object], Callable[[], Mapping[str, torch.Tensor]]]
"""What is saved, what updates it, and its tensors."""


def of_torch(net: torch.nn.Module) -> Average:
    averaged = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY))
    return averaged, lambda: averaged.update_parameters(net), averaged.state_dict


def by_hand(net: torch.nn.Module) -> Average:
    average = {name: each.detach().clone() for name, each in net.named_parameters()}

    def update() -> None:
        with torch.no_grad():
            for name, each in net.named_parameters():
                average[name].lerp_(each, 1 - DECAY)

    return average, update, lambda: average


KINDS: Final = [of_torch, by_hand]


def make(kind: Callable[[torch.nn.Module], Average], peer: Peer, _: Path) -> Parts:
    net = own_script.net_of()
    average, update, tensors = kind(net)
    model = own_script.parallel(net, peer)
    return Parts(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        loader=own_script.loader_of(peer),
        more={"average": average},
        stepped=update,
        told=lambda: {f"average.{name}": each for name, each in tensors().items()},
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_with_its_average(
    ranks: Ranks, tmp_path: Path, kind: Callable[[torch.nn.Module], Average], num_ranks: int
) -> None:
    """Losses, weights and averages, bit for bit, from memory and from storage; with one process and with DDP."""
    script = functools.partial(own_script.run, functools.partial(make, kind))
    interrupted.assert_resumes(ranks, tmp_path, script, num_ranks=num_ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_changes_beside_a_save_is_saved_as_it_was_at_its_step(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Callable[[torch.nn.Module], Average]
) -> None:
    """
    The weights are copied beside the training, and the average is updated before that copy runs. Each checkpoint holds both as they were.
    """
    monkeypatch.setattr(late, "USUAL_MIN_BYTES", 1)
    monkeypatch.setattr(late, "USUAL_MIN_MEAN_BYTES", 1)

    def trained(peer: Peer) -> list[bool]:
        copies = HeldCopies()
        net = torch.nn.Linear(WIDE, WIDE)
        average, update, tensors = kind(net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        state = {"model": net.state_dict(), "average": average}
        wanted, overlapped = [], []
        with checkpointer.Checkpointer(tmp_path / "runs") as opened:
            for step in range(1, SAVES + 1):
                net(torch.randn(4, WIDE)).square().mean().backward()
                copies.let_go.set()
                optimizer.step()
                optimizer.zero_grad()
                copies.let_go.clear()
                before = {name: each.clone() for name, each in tensors().items()}
                handle = opened.save(state, step)
                overlapped.append(not handle.staged.done())
                wanted.append((copy.deepcopy(net.state_dict()), before))
                update()
                assert not all(torch.equal(each, before[name]) for name, each in tensors().items())
            copies.let_go.set()
            handle.result(Deadline.COMMITTED.s)
            for step, (weights, averages) in enumerate(wanted, 1):
                loaded = opened.read(step)
                for key, tensors_then in (("model", weights), ("average", averages)):
                    assert loaded[key].keys() == tensors_then.keys()
                    for name, each in tensors_then.items():
                        assert torch.equal(loaded[key][name], each), (step, key, name)
        return overlapped

    # The first save watches the weights, and the step behind it finds that nothing else changes them.
    assert ranks.start(trained).finish(Deadline.SCRIPT) == [[False] + [True] * (SAVES - 1)]


WIDE: Final = 160
"""A square matrix of it has more than late.SMALL_LEAF_BYTES."""
