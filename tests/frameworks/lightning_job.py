"""
The whole of: a small Lightning script, and what a run of it leaves behind for a test: losses, weights, random numbers, paths.

Called from: test_lightning.py, in the forked ranks of a job. Importing it imports Lightning.
Must never: know of Pillion; the test gives it its callbacks and plugins.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader

from process.ranks import Peer

KILLED: Final = 7
"""Exit status of a rank that ended itself."""


class Data(torch.utils.data.Dataset[torch.Tensor]):
    """Items that draw when they are read, as an augmentation does."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((8,), float(index)) / self._size + random.random() / 100


class Script(lightning.LightningModule):  # type: ignore[misc] # Lightning has no types here
    """A model with dropout, Adam and a schedule for each step."""

    def __init__(self, out: Path, kill_after: int | None) -> None:
        super().__init__()
        torch.manual_seed(5)
        random.seed(5)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 8))
        self.out, self.kill_after = out, kill_after
        self.told: dict[str, Any] = {"losses": {}}

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss: torch.Tensor = (self.net(batch) - batch).square().mean()
        self.told["losses"][self.global_step + 1] = loss.item()
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        # Best at step 4.
        self.log("val", float(abs(self.global_step - 4)), sync_dist=True)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.global_step == self.kill_after:
            (self.out / f"killed.{self.global_rank}").write_text(json.dumps(self.told))
            os._exit(KILLED)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    out: Path,
    strategy: str,
    callbacks: Callable[[], list[Any]],
    *,
    kill_after: int | None = None,
    epochs: int = 3,
    plugins: Callable[[], list[Any]] = list,
    ckpt_path: str | None = None,
    loaded_by: type[torch.utils.data.DataLoader[Any]] = StatefulDataLoader,
    **options: Any,
) -> dict[str, Any]:
    """Fit, and return losses, weights, and what the callbacks say. With `kill_after` the process ends as if killed behind that step and its save."""
    out.mkdir(exist_ok=True)
    made: Any = strategy
    if strategy == "fsdp2":
        made = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    num_devices = 1 if strategy == "auto" else 2
    trainer = lightning.Trainer(
        accelerator="cpu", devices=num_devices, strategy=made, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks(), plugins=plugins(), default_root_dir=out,
        **{"enable_checkpointing": bool(callbacks()), "limit_val_batches": 0} | options,
    )  # fmt: skip
    script = Script(out, kill_after)
    loader = loaded_by(Data(16 * num_devices), batch_size=4, shuffle=True)
    held_out = torch.utils.data.DataLoader(Data(4 * num_devices), batch_size=4)
    trainer.fit(script, loader, held_out, ckpt_path=ckpt_path)
    weights = {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().numpy().tobytes().hex()
        for name, each in script.net.state_dict().items()
    }
    script.told |= {"weights": weights, "random": float(torch.rand(()))}
    for callback in trainer.checkpoint_callbacks:
        script.told |= {name: getattr(callback, f"{name}_model_path") for name in ("best", "last")}
        report = getattr(getattr(callback, "checkpointer", None), "last_load", None)
        if report is not None:
            script.told |= {"tier": report.tier.value, "from": report.step}
    return script.told


def fits(*arguments: Any, **options: Any) -> Callable[[Peer], Any]:
    """Return the body of a rank that fits as `fit` does."""
    return lambda _: fit(*arguments, **options)
