"""
The whole of: metrics and metadata of a save, from the script to the manifest, to `find` and `latest`, and to which checkpoints stay.

Called from: pytest.
"""

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import pillion
from pillion import checkpointer
from pillion.wire import names
from pillion.wire.load_messages import Tier
from process.ranks import Peer, Ranks, committed
from support import deadlines
from support.deadlines import Deadline

BEST: dict[str, Any] = {"keepLast": 1, "keepBest": {"metric": "loss", "mode": "Min", "count": 2}}


def state_of(step: int) -> dict[str, Any]:
    return {"w": torch.full((50,), float(step)), "step": step}


def test_the_best_and_the_newest_checkpoints_stay_and_each_says_what_it_is(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NaN is never the best, a save without the metric neither; what `load` would take says its metrics, in memory and on storage."""
    opened = ranks.open(tmp_path, retention=BEST, trigger={"onTermination": "Skip"})
    for step, loss in ((1, 5.0), (2, 1.0), (3, 4.0), (4, 2.0), (5, math.nan), (6, None), (7, 9.0)):
        metrics = None if loss is None else {"loss": loss, "accuracy": 0.5}
        handle = opened.save(state_of(step), step, metrics=metrics, metadata={"tag": ["step", step]})
        assert repr(handle.result(Deadline.COMMITTED.s).metrics) == repr(metrics or {})
    deadlines.eventually(lambda: committed(tmp_path) == [2, 4, 7], Deadline.SETTLE, "the best two and the newest stay")
    said = {"metrics": {"loss": 9.0, "accuracy": 0.5}, "metadata": {"tag": ["step", 7]}}
    latest, found = opened.latest(), opened.find()
    assert latest is not None
    assert (latest.step, latest.metrics, latest.metadata) == (7, *said.values())
    assert found == pillion.Found(step=7, tier=Tier.ARENA, path=None, **said)  # type: ignore[arg-type] # mypy takes `said` for a dict of one type
    older = opened.find(2, path=tmp_path)
    assert older is not None
    assert older.metrics["loss"] == 1.0
    manifest = json.loads((tmp_path / "step-7" / names.MANIFEST).read_text())
    assert {name: manifest[name] for name in said} == said
    with caplog.at_level(logging.WARNING):
        assert opened.save(state_of(7), 7, metrics={"loss": 0.0}) is handle
    assert "step 7 is saved already, and keeps the metrics" in caplog.text
    opened.save(state_of(8), 8, persist=False, metrics={"loss": 0.25}).result(Deadline.COMMITTED.s)
    found = opened.find()
    assert found is not None
    assert (found.step, found.metrics) == (8, {"loss": 0.25})


def test_rank_0_says_it_and_what_it_said_of_a_snapshot_survives_both_trainers(ranks: Ranks, tmp_path: Path) -> None:
    """The snapshot reaches storage after both were killed; its manifest has rank 0's metrics, though no rank was there any more."""

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer(tmp_path, policy={"retention": BEST})
        metrics = {"loss": 0.5} if peer.rank == 0 else {"loss": 99.0, "other": 1}
        opened.save(state_of(1) | {f"own{peer.rank}": peer.rank}, 1, persist=False, metrics=metrics).result(
            Deadline.COMMITTED.s
        )
        peer.tell()
        peer.hear()

    job = ranks.start(train, num_ranks=2)
    job.hear()
    job.kill()
    deadlines.eventually(lambda: committed(tmp_path) == [1], Deadline.COMMITTED, "the snapshot is rescued")
    manifest = json.loads((tmp_path / "step-1" / names.MANIFEST).read_text())
    assert manifest["metrics"] == {"loss": 0.5}


def test_a_commit_that_a_later_run_finishes_has_them_too(ranks: Ranks, tmp_path: Path) -> None:
    """The part of rank 0's pod has them, so that the manifest can be made again from the parts."""

    def train(_: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path) as opened:
            opened.save(state_of(1), 1, metrics={"loss": 3.5}, metadata={"a": 1}).result(Deadline.COMMITTED.s)

    ranks.start(train).finish()
    ranks.alone()
    for name in (names.MANIFEST, names.COMMIT_MARKER):
        (tmp_path / "step-1" / name).unlink()
    opened = ranks.open(tmp_path)
    found = opened.find()
    assert found is not None
    assert (found.step, found.metrics, found.metadata) == (1, {"loss": 3.5}, {"a": 1})


def test_a_save_with_the_most_metadata_is_sealed_and_persisted_by_a_new_sidecar(ranks: Ranks, tmp_path: Path) -> None:
    """64 KiB of it do not fit into the room that a slot has for small changes: the slot grows by it. The sidecar dies after the seal."""
    opened = ranks.open(tmp_path)
    opened.save({"w": torch.ones(3)}, 1).result(Deadline.COMMITTED.s)
    metadata = {"text": "x" * 65_000}
    opened.save({"w": torch.ones(3)}, 2, persist=False, metadata=metadata).result(Deadline.COMMITTED.s)
    os.kill(ranks.sidecar(), signal.SIGKILL)
    found = deadlines.eventually(opened.find, Deadline.COMMITTED, "a new sidecar has the snapshot")
    assert found is not None
    assert (found.step, found.metadata) == (2, metadata)
