"""
How long a save holds the training loop up, beside a plain copy of as many bytes; and the first save beside the later ones.

Called from: run.py. Each save is committed before the next begins, so that no save waits for a slot; floor and save alternate.
"""

from __future__ import annotations

import statistics

import floors
import measures
import torch

CASES = (
    # tensors, busy GIL, goal
    (64, False, 1.10),
    (10_000, False, 1.5),
    (64, True, 1.5),
    (10_000, True, 1.5),
)


def measure(of: measures.Settings) -> list[measures.Line]:
    lines: list[measures.Line] = []
    source, target = measures.private_memory(of.num_bytes), floors.shared_memory(of.num_bytes)
    for num_tensors, busy, goal in CASES:
        state_dict = measures.state(of.num_bytes, num_tensors)
        ratios, stalls, durables = [], [], []
        with measures.scratch(of) as root, measures.checkpointer(root) as checkpointer:
            measures.prepare(checkpointer, state_dict)
            with measures.busy_gil(busy):
                for step in range(1, of.repeat + 2):
                    floor_s = measures.copy_floor_s(target, source)
                    handle = checkpointer.save(state_dict, step)
                    stalls.append(handle.stall_s)
                    durables.append(measures.seconds(lambda made=handle: made.result(measures.SAVE_TIMEOUT_S)))  # type: ignore[misc]
                    ratios.append(handle.stall_s / floor_s)
        name = f"{num_tensors} tensors" + (", busy GIL" if busy else "")
        lines.append(measures.median_line(f"stall / memcpy, {name}", ratios[1:], goal=goal))
        lines.append(measures.median_line(f"stall, {name}", stalls[1:], unit="s"))
        if not busy:
            for what, values in (("stall", stalls), ("time to durable", durables)):
                ratio = values[0] / statistics.median(values[1:])
                goal_first = 1.3 if num_tensors == 64 else None
                lines.append(measures.Line(what=f"first / later {what}, {name}", measured=ratio, goal=goal_first))
    lines += _overlapped(of, source, target)
    return lines


def _overlapped(of: measures.Settings, source: memoryview, target: memoryview) -> list[measures.Line]:
    """`overlap=True`: the copy beside the next forward and backward pass; the optimizer waits for what is left of it."""
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
            handle = checkpointer.save(state_dict, step, overlap=True)
            called.append(handle.stall_s / floor_s)
            while not handle.staged.done():
                model(batch).square().mean().backward()
            optimizer.step()
            whole.append(handle.stall_s / floor_s)
            handle.result(measures.SAVE_TIMEOUT_S)
    return [
        measures.median_line("overlap=True: stall of save() / memcpy", called[1:], goal=0.05),
        measures.median_line("overlap=True: with the optimizer's wait / memcpy", whole[1:], goal=0.05),
    ]
