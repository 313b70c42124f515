"""
The whole of: training with tensors of torchao: optimizers with moments of few bits, weights of int8, and matrix products in float8.

Called from: pytest, in the environment that has torchao.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torchao import optim
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.prototype.quantized_training import int8_weight_only_quantized_training
from torchao.quantization import quantize_

from frameworks import interrupted, own_script
from frameworks.own_script import Parts
from process.ranks import Peer, Ranks

LR: Final = 0.01


def in_float8(net: torch.nn.Module) -> None:
    convert_to_float8_training(net, config=Float8LinearConfig(emulate=True))  # by products of float32, without a GPU


def in_int8(net: torch.nn.Module) -> None:
    quantize_(net[:4], int8_weight_only_quantized_training())  # type: ignore[index] # a Sequential


def make(change: Callable[[Any], object], optimizer_of: Callable[..., Any], peer: Peer, _: Path) -> Parts:
    # torchao compiles each update otherwise, which takes a minute on a CPU. Its tensors are the same.
    torch.compiler.set_stance("force_eager")
    net = own_script.net_of()
    change(net)
    model = own_script.parallel(net, peer)
    optimizer = optimizer_of(model.parameters(), lr=LR)

    def moments() -> dict[str, torch.Tensor]:
        named = dict(net.named_parameters())
        return {f"{name}.{key}": each for name in named for key, each in optimizer.state[named[name]].items()}

    return Parts(model=model, optimizer=optimizer, loader=own_script.loader_of(peer), told=moments)


@pytest.mark.parametrize(
    ("change", "optimizer_of", "num_ranks", "within"),
    [
        (lambda net: None, optim.AdamW8bit, 1, {"exp_avg.codes"}),
        (lambda net: None, optim.AdamW8bit, 2, {"exp_avg.codes"}),
        (lambda net: None, optim.AdamW4bit, 1, {"exp_avg.codes"}),
        (lambda net: None, optim.AdamWFp8, 1, {"exp_avg.codes"}),
        (in_int8, optim.AdamW8bit, 1, {"exp_avg.codes", "weight.int_data"}),
        (in_float8, torch.optim.AdamW, 1, set()),
        (in_float8, torch.optim.AdamW, 2, set()),
    ],
    ids=["8-bit", "8-bit-ddp", "4-bit", "fp8", "int8-weights", "float8-products", "float8-products-ddp"],
)
def test_a_killed_run_of_few_bits_resumes_with_the_same_bits(
    ranks: Ranks, tmp_path: Path, change: Any, optimizer_of: Any, num_ranks: int, within: set[str]
) -> None:
    """Losses, weights and moments, bit for bit, from memory and from storage: those within a tensor of few bits, and not what they stand for."""
    script = functools.partial(own_script.run, functools.partial(make, change, optimizer_of))
    interrupted.assert_resumes(ranks, tmp_path, script, num_ranks=num_ranks)
    names = torch.load(tmp_path / "whole" / "weights.0.pt")
    assert all(any(name.endswith(end) for name in names) for end in within)
