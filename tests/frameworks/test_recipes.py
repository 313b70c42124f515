"""
The whole of: what the guide says of PEFT and trl: each is saved and restored by the lines that stand there.

Called from: pytest, in the environment that has them.
"""

import os
from pathlib import Path
from typing import Any, Final

import datasets
import peft
import pytest
import tokenizers
import torch
import transformers
import trl
from torch.distributed import checkpoint as stock

from frameworks import losses
from frameworks.test_transformers import POLICY, Rows, Tell, arguments, model
from pillion import checkpointer
from pillion.transformers import PillionTrainer, PillionTrainerMixin
from process.ranks import Peer, Ranks, committed
from support.deadlines import Deadline

KILLED_AT: Final = 5
STEPS: Final = 6


class PillionSFTTrainer(PillionTrainerMixin, trl.SFTTrainer):  # type: ignore[misc] # the types are checked without trl
    """As the guide writes it."""


def lora() -> Any:
    wrapped = peft.get_peft_model(model(), peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, each in wrapped.named_parameters():
            if "lora_B" in name:  # which begin as zero, so that a first gradient of lora_A is zero
                each.fill_(0.1)
    return wrapped


def with_peft(folder: Path, callbacks: list[Any], **pillion_too: Any) -> Any:
    kind: Any = PillionTrainer if pillion_too else transformers.Trainer
    args = arguments(folder / "output", max_steps=STEPS)
    return kind(model=lora(), args=args, train_dataset=Rows(12), callbacks=callbacks, **pillion_too)


def with_trl(folder: Path, callbacks: list[Any], **pillion_too: Any) -> Any:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0"
    )
    rows = [{"input_ids": each["input_ids"].tolist()} for each in map(Rows(12).__getitem__, range(12))]
    kind: Any = PillionSFTTrainer if pillion_too else trl.SFTTrainer
    plain = arguments(folder / "output", max_steps=STEPS)
    args = trl.SFTConfig(
        str(folder / "output"),
        **{name: getattr(plain, name) for name in ("max_steps", "logging_steps", "learning_rate", "seed")},
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    return kind(
        model=model(),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=callbacks,
        **pillion_too,
    )


@pytest.mark.parametrize("make", [with_peft, with_trl])
def test_a_trainer_of_peft_and_of_trl_resumes_as_the_one_without_pillion_went_on(
    ranks: Ranks, tmp_path: Path, make: Any
) -> None:
    """Killed and resumed from memory, bit for bit. Of a PEFT model the checkpoint has the adapters, and not the base."""

    def run(peer: Peer, folder: Path, root: Path | None, kill_at: int = -1) -> int | None:
        folder.mkdir(exist_ok=True)
        callbacks = [Tell(folder, peer.rank, kill_at)]
        start = None
        if root is None:
            trainer = make(folder, callbacks)
            trainer.train()
        else:
            with checkpointer.Checkpointer(root, policy=POLICY) as opened:
                trainer = make(folder, callbacks, checkpointer=opened)
                trainer.train(resume_from_checkpoint=True)
                start = None if opened.last_load is None else opened.last_load.step
        losses.note_weights(folder, peer.rank, trainer.model.state_dict())
        return start

    root, whole, first, second = (tmp_path / name for name in ("runs", "whole", "first", "second"))
    ranks.start(lambda peer: run(peer, whole, None)).finish(Deadline.SCRIPT)
    killed = ranks.start(lambda peer: run(peer, first, root, KILLED_AT))
    assert killed[0].wait(Deadline.SCRIPT) == 7
    assert ranks.start(lambda peer: run(peer, second, root), attempt=1).finish(Deadline.SCRIPT) == [KILLED_AT - 1]
    losses.assert_equal(whole, first, second, ranks=1, killed_at=KILLED_AT, resumed_from=KILLED_AT - 1)
    names = stock.FileSystemReader(os.fspath(root / f"step-{committed(root)[-1]}")).read_metadata().state_dict_metadata
    weights = [name for name in names if name.startswith("model.")]
    assert weights
    assert all("lora_" in name for name in weights) == (make is with_peft)
