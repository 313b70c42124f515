"""
The whole of: torchtitan's own trainer on CPUs, and what a run of it leaves behind for a test: losses, weights, the tier of its load.

Called from: test_torchtitan.py, in the forked ranks of a job. Importing it imports torchtitan.
Must never: touch the checkpoint manager; what torchtitan gets on a CPU is only what it lacks there.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torchtitan.distributed.utils
import torchtitan.models.common.decoder
import torchtitan.trainer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from pillion.torchtitan import PillionCheckpointManager
from process.ranks import Peer

__all__ = ["CheckpointManager", "PillionCheckpointManager", "llama3_debugmodel", "make_assets", "off", "trains"]

KILLED: Final = 7
"""Exit status of a rank that ended itself."""
_WORDS: Final = 400


def make_assets(folder: Path) -> Path:
    """Write a tokenizer and a data set: torchtitan's own are on a hub."""
    (folder / "text").mkdir(parents=True)
    words = {word: index for index, word in enumerate([*(f"w{n}" for n in range(_WORDS)), "<unk>", "<s>", "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(_WORDS)}" for _ in range(90)) for _ in range(150)]
    (folder / "text" / "data.json").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def config(out: Path, assets: Path, steps: int) -> Any:
    """Torchtitan's debug model, cut down to what a CPU trains in seconds."""
    made = llama3_debugmodel()
    made.training.seq_len, made.training.local_batch_size, made.training.steps = 32, 2, steps
    made.training.disable_cuda_graphs = True
    made.validator.enable = False
    made.activation_checkpoint = None
    made.debug.seed, made.debug.deterministic = 1, True
    made.dump_folder = str(out)
    made.loss = made.loss.loss_fn  # whole, not in eight pieces
    made.hf_assets_path = str(assets)
    made.dataloader.dataset_path = str(assets / "text")
    layers = made.model_spec.model.layers
    del layers[2:]
    return made


def off() -> Any:
    """Return the config of a run that saves nothing."""
    return CheckpointManager.Config(enable=False)


def train(
    out: Path,
    assets: Path,
    checkpoint: Any,
    *,
    steps: int,
    kill_after: int | None = None,
    change: Callable[[Any], None] = lambda _: None,
) -> dict[str, Any]:
    """
    Train for `steps` in all, and return what came of it. With `kill_after` the process ends as if killed, behind that step and before its save.

    Args:
        checkpoint: the checkpoint manager's config.
        change: called with the config.
    """
    out.mkdir(exist_ok=True)
    os.environ["HF_DATASETS_CACHE"] = str(assets / "cache")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    torch.autograd.set_multithreading_enabled(False)
    told: dict[str, Any] = {"losses": {}, "random": {}}
    with _on_cpus():
        made = config(out, assets, steps)
        made.checkpoint = checkpoint
        change(made)
        trainer = made.build()
        for part in trainer.model_parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no average
        log = trainer.metrics_processor.log
        step_of = trainer.train_step

        def train_step(batches: Iterator[Any]) -> None:
            step_of(batches)
            told["random"][trainer.step] = float(torch.rand(()))  # as dropout would
            opened = getattr(trainer.checkpointer, "_checkpointer", None)
            if opened is not None and opened.last_load is not None:
                told["tier"], told["from"] = opened.last_load.tier.value, opened.last_load.step
            if trainer.step == kill_after:
                (out / f"killed.{dist.get_rank()}").write_text(json.dumps(told))
                os._exit(KILLED)

        def note(step: int, loss: float, *rest: Any, **more: Any) -> None:
            told["losses"][step] = loss
            log(step, loss, *rest, **more)

        trainer.train_step, trainer.metrics_processor.log = train_step, note
        try:
            trainer.train()
        finally:
            trainer.close()
        told["weights"] = _digest([part.state_dict() for part in trainer.model_parts])
        told["optimizer"] = _digest(trainer.optimizers.state_dict())
    return told


def trains(*arguments: Any, **options: Any) -> Callable[[Peer], Any]:
    """Return the body of a rank that trains as `train` does."""
    return lambda _: train(*arguments, **options)


def _digest(state: Any) -> str:
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for each in value:
                add(each)
        elif isinstance(value, torch.Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value
            digest.update(local.detach().contiguous().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    add(state)
    return digest.hexdigest()


@contextlib.contextmanager
def _on_cpus() -> Iterator[None]:
    """Give torchtitan what it takes from a GPU and from FlexAttention."""

    def causal(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), None

    device = dataclasses.make_dataclass("Device", [("name", str, "cpu"), ("total_memory", int, 8 << 30)])
    lacking: dict[str, Any] = {
        "get_device_properties": lambda *_: device(),
        "get_device_name": lambda *_: "cpu",
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda *_: None,
        "memory_stats": lambda *_: collections.defaultdict(int),
    }
    patch = unittest.mock.patch.object
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # they are torchtitan's own, of torch on a CPU
        for name, value in lacking.items():
            if not hasattr(torch.cpu, name):
                stack.enter_context(patch(torch.cpu, name, value, create=True))
        for owner, name, value in (
            (torch.cpu, "set_device", lambda *_: None),
            (torchtitan.distributed.utils, "set_pg_timeouts", lambda *_, **__: None),
            (torchtitan.trainer.time, "sleep", lambda _: None),  # it gives other ranks two seconds at the end
            (FlexAttention, "compiled_flex_attn", staticmethod(causal)),
            (torchtitan.models.common.decoder, "create_attention_mask", create_block_mask),
        ):
            stack.enter_context(patch(owner, name, value))
        for module in [each for name, each in sys.modules.items() if name.startswith("torchtitan.")]:
            for name, value in (("device_type", "cpu"), ("device_module", torch.cpu)):
                if name in vars(module):
                    stack.enter_context(patch(module, name, value))
        yield
