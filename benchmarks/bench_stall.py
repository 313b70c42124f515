"""
How long a save holds the training loop up, beside a plain copy of as many bytes; and the first save beside the later ones.

Called from: run.py. Each save is committed before the next begins, so that no save waits for a slot; floors and save take turns. There are two floors:
one block, and the same pieces one by one. glibc's memmove has other stores from a size on that it derives from the last-level cache (`x86_non_temporal_threshold`),
which a virtual machine may see as larger than any tensor. So all of it is measured a second time in a process with a threshold of 4 MiB, which most servers have.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import floors
import measures
import torch

CASES = (
    # tensors, busy GIL, goal beside the same pieces
    (64, False, 1.10),
    (10_000, False, 1.3),
    (64, True, 1.10),
    (10_000, True, 1.3),
)
TUNABLES_VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.cpu.x86_non_temporal_threshold=0x400000"
TUNED_GOAL = 1.10
"""Beside one block, with 64 tensors."""
TUNED_TIMEOUT_S = 900.0


def measure(of: measures.Settings) -> list[measures.Line]:
    lines = _measure(of)
    return lines if TUNABLES_VARIABLE in os.environ else lines + _tuned(of)


def _measure(of: measures.Settings) -> list[measures.Line]:
    is_tuned = os.environ.get(TUNABLES_VARIABLE) == TUNABLE
    lines: list[measures.Line] = []
    source, target = measures.private_memory(of.num_bytes), floors.shared_memory(of.num_bytes)
    for num_tensors, busy, goal in CASES:
        state_dict = measures.state(of.num_bytes, num_tensors)
        sources = [memoryview(each.numpy()).cast("B") for each in state_dict["model"].values()]
        targets = _cut(target, [len(each) for each in sources])
        to_block, to_pieces, stalls, durables = [], [], [], []
        with measures.scratch(of) as root, measures.checkpointer(root) as checkpointer:
            measures.prepare(checkpointer, state_dict)
            with measures.busy_gil(busy):
                for step in range(1, of.repeat + 2):
                    block_s = measures.copy_floor_s(target, source)
                    pieces_s = floors.memcpy_pieces_s(targets, sources, torch.get_num_threads())
                    handle = checkpointer.save(state_dict, step)
                    stalls.append(handle.stall_s)
                    durables.append(measures.seconds(lambda made=handle: made.result(measures.SAVE_TIMEOUT_S)))  # type: ignore[misc]
                    to_block.append(handle.stall_s / block_s)
                    to_pieces.append(handle.stall_s / pieces_s)
        name = f"{num_tensors} tensors" + (", busy GIL" if busy else "")
        block_goal = TUNED_GOAL if is_tuned and num_tensors == 64 and not busy else None
        lines.append(measures.median_line(f"stall / memcpy of the same pieces, {name}", to_pieces[1:], goal=goal))
        lines.append(measures.median_line(f"stall / memcpy of one block, {name}", to_block[1:], goal=block_goal))
        lines.append(measures.median_line(f"stall, {name}", stalls[1:], unit="s"))
        if not busy:
            for what, values in (("stall", stalls), ("time to durable", durables)):
                ratio = values[0] / statistics.median(values[1:])
                goal_first = 1.3 if num_tensors == 64 else None
                lines.append(measures.Line(what=f"first / later {what}, {name}", measured=ratio, goal=goal_first))
    for overlap in (True, None):
        lines += _overlapped(of, source, target, overlap=overlap)
    return lines


def _cut(block: memoryview, lengths: list[int]) -> list[memoryview]:
    """The block in pieces of these lengths, one after the other."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return [block[start : start + length] for start, length in zip(starts, lengths, strict=False)]


def _tuned(of: measures.Settings) -> list[measures.Line]:
    """The same lines of a process with glibc's threshold at 4 MiB."""
    with tempfile.TemporaryDirectory(prefix="pillion-bench-") as folder:
        found = Path(folder) / "lines.json"
        command = [sys.executable, str(Path(__file__).with_name("run.py")), "--only", "stall", "--json", str(found)]
        command += ["--bytes", str(of.num_bytes), "--repeat", str(of.repeat), "--dir", str(of.directory)]
        subprocess.run(
            command,
            env=os.environ | {TUNABLES_VARIABLE: TUNABLE},
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=TUNED_TIMEOUT_S,
        )
        rows = json.loads(found.read_text(encoding="utf-8"))["lines"]
    for row in rows:
        del row["verdict"]
    return [measures.Line(**row | {"what": f"tuned: {row['what']}", "samples": tuple(row["samples"])}) for row in rows]


def _overlapped(
    of: measures.Settings, source: memoryview, target: memoryview, *, overlap: bool | None
) -> list[measures.Line]:
    """
    The copy beside the next forward and backward pass; the optimizer waits for what is left of it.

    Args:
        overlap: as for `save`. With None the first save copies at once and watches; it is not in the rows.
    """
    state_dict = measures.state(of.num_bytes, 64)
    called, whole = [], []
    model = torch.nn.Linear(2048, 2048)
    # It steps the state too, which has no gradients: what no optimizer steps is copied before save() returns.
    optimizer = torch.optim.SGD([*model.parameters(), *state_dict["model"].values()], lr=1e-3)
    optimizer.step()
    batch = torch.randn(2048, 2048)
    with measures.scratch(of) as root, measures.checkpointer(root) as checkpointer:
        measures.prepare(checkpointer, state_dict)
        for step in range(1, of.repeat + 2):
            floor_s = measures.copy_floor_s(target, source)
            handle = checkpointer.save(state_dict, step, overlap=overlap)
            called.append(handle.stall_s / floor_s)
            while not handle.staged.done():
                model(batch).square().mean().backward()
            optimizer.step()
            whole.append(handle.stall_s / floor_s)
            handle.result(measures.SAVE_TIMEOUT_S)
    return [
        measures.median_line(f"overlap={overlap}: stall of save() / memcpy", called[1:], goal=0.05),
        measures.median_line(f"overlap={overlap}: with the optimizer's wait / memcpy", whole[1:], goal=0.05),
    ]
