"""
The whole of: models under `torch.compile`, whose own state dict has other names: checkpoints of a compiled and of a plain model, and what an
error says to a script that mixes their names up.

Called from: pytest, in the environment that has torchdata.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import pillion
from frameworks import interrupted, own_script
from frameworks.own_script import Parts
from pillion import checkpointer
from pillion.state import app_state
from process.ranks import Peer, Ranks
from support.deadlines import Deadline

BACKEND: Final = "aot_eager"
"""It wraps and traces as the default one does, and needs no compiler of C++."""


def compiled(net: torch.nn.Module) -> Any:
    return torch.compile(net, backend=BACKEND)


def compiled_layer(net: Any) -> Any:
    net[3] = compiled(net[3])
    return net


def compiled_in_place(net: torch.nn.Module) -> torch.nn.Module:
    net.compile(backend=BACKEND)
    return net


def plain(net: torch.nn.Module) -> torch.nn.Module:
    return net


def make(around: Callable[[Any], Any], peer: Peer, _: Path) -> Parts:
    model = around(own_script.parallel(own_script.net_of(), peer))
    return Parts(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        loader=own_script.loader_of(peer),
    )


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_compiled_model_resumes_as_the_one_without_pillion_went_on(
    ranks: Ranks, tmp_path: Path, num_ranks: int
) -> None:
    """Losses and weights, bit for bit, from memory and from storage; with one process and around DDP."""
    script = functools.partial(own_script.run, functools.partial(make, compiled))
    interrupted.assert_resumes(ranks, tmp_path, script, num_ranks=num_ranks)


def stepped(around: Callable[[Any], Any], seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """Return a model with weights of this seed, and an optimizer that has stepped."""
    net = own_script.net_of()
    model = around(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(seed)
    model(torch.randn(4, own_script.WIDTH)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def values_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[torch.Tensor]:
    moments = [] if optimizer is None else [each for one in optimizer.state.values() for each in one.values()]
    return [each.detach().clone() for each in [*model.state_dict().values(), *moments]]


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [(compiled, plain), (plain, compiled), (compiled_layer, compiled), (compiled_in_place, compiled_layer)],
)
def test_app_state_has_the_same_names_for_a_compiled_model_and_a_plain_one(
    ranks: Ranks, tmp_path: Path, saved_by: Any, loaded_by: Any
) -> None:
    """A checkpoint of one is loaded by the other, weights and moments, whatever part of it is compiled."""

    def trained(peer: Peer) -> bool:
        with checkpointer.Checkpointer(tmp_path / "runs") as opened:
            model, optimizer = stepped(saved_by, 1)
            opened.save(app_state(model, optimizer), 1).result(Deadline.COMMITTED.s)
            other, its_own = stepped(loaded_by, 2)
            expected = values_of(model, optimizer)
            assert not all(map(torch.equal, values_of(other, its_own), expected))
            assert app_state(other, its_own).load(opened) == 1
            assert opened.last_load is not None
            assert opened.last_load.unexpected == opened.last_load.missing == ()
            return all(map(torch.equal, values_of(other, its_own), expected))

    assert ranks.start(trained).finish(Deadline.SCRIPT) == [True]


def without_prefix(name: str) -> str:
    return name.replace("_orig_mod.", "")


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "rename", "told", "in_memory"),
    [
        (plain, compiled, {"model._orig_mod": "model"}, "rename={'model._orig_mod': 'model'}", False),
        (compiled, plain, {"model": "model._orig_mod"}, "rename={'model': 'model._orig_mod'}", False),
        (compiled, plain, {"model": "model._orig_mod"}, "rename={'model': 'model._orig_mod'}", True),
        (compiled_layer, plain, {"model.3": "model.3._orig_mod"}, "rename={'model.3': 'model.3._orig_mod'}", False),
        (plain, compiled_layer, without_prefix, "rename={'model.3._orig_mod': 'model.3'}", False),
        (compiled_in_place, plain, {}, None, False),
    ],
    ids=["plain-compiled", "compiled-plain", "compiled-plain-memory", "layer-plain", "plain-layer", "in-place-plain"],
)
def test_a_state_dict_of_the_models_own_has_the_names_of_its_moment_and_an_error_says_which_rename_it_takes(
    ranks: Ranks, tmp_path: Path, saved_by: Any, loaded_by: Any, rename: Any, told: str | None, in_memory: bool
) -> None:
    """Nothing is loaded without the rename, and all with it; a module that was compiled in place has the plain names."""

    def trained(peer: Peer) -> list[str]:
        texts = []
        policy = {"trigger": {"onTermination": "Skip"}}
        with checkpointer.Checkpointer(tmp_path / "runs", policy=policy) as opened:
            model, _ = stepped(saved_by, 1)
            opened.save({"model": model.state_dict()}, 1, persist=not in_memory).staged.result(Deadline.STAGED.s)
            opened.wait(Deadline.COMMITTED.s)
            other, _ = stepped(loaded_by, 2)
            before = values_of(other)
            if told is not None:
                with pytest.raises(pillion.IncompatibleCheckpoint) as caught:
                    opened.load({"model": other.state_dict()})
                texts.append(str(caught.value))
                assert all(map(torch.equal, values_of(other), before))
            if rename is not None:
                assert opened.load({"model": other.state_dict()}, rename=rename) == 1
                assert all(map(torch.equal, values_of(other), values_of(model)))
        return texts

    (texts,) = ranks.start(trained).finish(Deadline.SCRIPT)
    assert len(texts) == (told is not None)
    assert all("torch.compile" in text and str(told) in text for text in texts)
