"""
Loads from the arena beside a copy of the same bytes, by trainers that have started again and by one that lives; and from storage beside a raw O_DIRECT read; digests verified.

Called from: run.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import floors
import measures

import pillion
from pillion.wire import arena

LIFE_TIMEOUT_S = 300.0
"""Timeout for one trainer of `restarted_trainer.py`: it imports torch, and saves or loads once."""


def measure(of: measures.Settings) -> list[measures.Line]:
    source, target = floors.shared_memory(of.num_bytes), floors.shared_memory(of.num_bytes)
    state_dict = measures.state(of.num_bytes, 64)
    lines: list[measures.Line] = []
    with measures.scratch(of) as root:
        with measures.checkpointer(root / "run") as checkpointer:
            measures.prepare(checkpointer, state_dict)
            checkpointer.save(state_dict, 1).result(measures.SAVE_TIMEOUT_S)
            ratios = []
            for _ in range(of.repeat + 1):
                floor_s = measures.copy_floor_s(target, source)
                ratios.append(floor_s / _load_s(checkpointer, state_dict, "arena")[0])
        lines += _restarted(of, root)
        lines.append(
            measures.median_line("memcpy / load from the arena, by a trainer that lives", ratios[1:], sense=">=")
        )
        warm: list[float] = []
        cold: list[float] = []
        for _ in range(max(2, of.repeat // 2)):
            # A new sidecar each time: its arena is empty, so what it loads can only come from storage.
            with measures.checkpointer(root / "run") as checkpointer:
                for target_ratios in (cold, warm, warm):
                    took_s, slot = _load_s(checkpointer, state_dict, "storage")
                    target_ratios.append(_raw_read_s(checkpointer, root / "run", of.num_bytes, slot) / took_s)
        lines.append(
            measures.median_line("raw O_DIRECT read / load from storage, arena ready", warm, goal=0.95, sense=">=")
        )
        lines.append(
            measures.median_line(
                "raw O_DIRECT read / load from storage, fresh arena",
                cold,
                note="the arena's memory is made within the load",
            )
        )
    return lines


def _restarted(of: measures.Settings, root: Path) -> list[measures.Line]:
    """Loads of trainers whose predecessor was killed. The sidecar verifies the snapshot while they start."""
    ratios, pieces, seconds, verified = [], [], [], 0
    for number in range(of.repeat):
        run = root / f"restarted-{number}"
        _life("save", run, of.num_bytes)
        found = json.loads(_life("load", run, of.num_bytes).splitlines()[-1])
        if found["tier"] != "arena":
            raise RuntimeError(f"expected a load from the arena, got {found}")
        verified += found["verified"]
        ratios.append(found["floor_s"] / found["load_s"])
        pieces.append(found["pieces_s"] / found["load_s"])
        seconds.append(found["load_s"])
    note = f"{verified} of {of.repeat} snapshots were verified before the load"
    return [
        measures.median_line("memcpy / load from the arena, after a restart", ratios, goal=0.9, sense=">=", note=note),
        measures.median_line("memcpy of the same pieces / load from the arena, after a restart", pieces, sense=">="),
        measures.median_line("load from the arena, after a restart", seconds, unit="s"),
    ]


def _life(what: str, run: Path, num_bytes: int) -> str:
    """What a trainer of one life prints."""
    script = str(Path(__file__).with_name("restarted_trainer.py"))
    done = subprocess.run(
        [sys.executable, script, what, str(run), str(num_bytes)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIFE_TIMEOUT_S,
        check=False,
    )
    if done.returncode not in (0, -9):
        raise RuntimeError(f"the trainer ended with {done.returncode}")
    return done.stdout


def _raw_read_s(checkpointer: pillion.Checkpointer, run: Path, num_bytes: int, slot: int) -> float:
    """
    The stored file into the slot that the load used, through the trainer's own mapping of it.

    Into other memory the same read takes from 0.6 to 1.7 times as long: the device moves to physical pages, and how
    scattered those are decides.
    """
    mapping = checkpointer._session.mapping
    if mapping is None:
        raise RuntimeError("the session has no arena")
    start = mapping.header.slot_offset(slot) + arena.PAGE_BYTES
    with memoryview(mapping._map) as whole, whole[start : start + num_bytes] as image:
        return floors.direct_read_s(next(run.glob("step-*/*.distcp")), image)


def _load_s(checkpointer: pillion.Checkpointer, state_dict: dict[str, object], tier: str) -> tuple[float, int]:
    """Seconds of a load, and the slot that it came through."""
    mapping = checkpointer._session.mapping
    if mapping is None:
        raise RuntimeError("the session has no arena")
    slots: list[int] = []
    copy_out = mapping.copy_out

    def noted(slot: int, *rest: Any) -> None:
        slots.append(slot)
        copy_out(slot, *rest)

    mapping.copy_out = noted  # type: ignore[method-assign, assignment]
    try:
        measures.prepare(checkpointer, state_dict)
    finally:
        mapping.copy_out = copy_out  # type: ignore[method-assign]
    report = checkpointer.last_load
    if report is None or report.tier != tier:
        raise RuntimeError(f"expected a load from {tier}, got {report}")
    return report.elapsed_s, slots[-1]
