"""
Time to durable beside a raw O_DIRECT write of the same bytes, and how much a training step slows down meanwhile.

Called from: run.py. `persist_s` is what the sidecar reports: from the last seal until every byte is on the disk.
"""

from __future__ import annotations

import statistics

import floors
import measures
import torch


def measure(of: measures.Settings) -> list[measures.Line]:
    lines: list[measures.Line] = []
    source = floors.shared_memory(of.num_bytes)
    for num_tensors, goal in ((64, 0.95), (10_000, None)):
        state_dict = measures.state(of.num_bytes, num_tensors)
        ratios, commits, durable = [], [], []
        with measures.scratch(of) as root, measures.checkpointer(root / "run") as checkpointer:
            measures.prepare(checkpointer, state_dict)
            for step in range(1, of.repeat + 2):
                raw_s = floors.direct_write_s(root / "raw", source)
                (root / "raw").unlink()
                handle = checkpointer.save(state_dict, step)
                waited_s = measures.seconds(lambda made=handle: made.result(measures.SAVE_TIMEOUT_S))  # type: ignore[misc]
                done = handle.result(0)
                ratios.append(raw_s / done.persist_s)
                commits.append(done.commit_s)
                durable.append(handle.stall_s + waited_s)
        name = f"{num_tensors} tensors"
        lines.append(
            measures.median_line(f"persist rate / raw O_DIRECT write, {name}", ratios[1:], goal=goal, sense=">=")
        )
        lines.append(measures.median_line(f"commit, {name}, one pod", commits[1:], unit="s", goal=0.1))
        lines.append(measures.median_line(f"save() until result(), {name}", durable[1:], unit="s"))
    return lines


def measure_steps(of: measures.Settings) -> list[measures.Line]:
    """A CPU training step (matrix products, an optimizer) while the sidecar persists, beside the same step alone."""
    lines: list[measures.Line] = []
    threads_before = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            lines += _step_lines(of, num_threads)
    finally:
        torch.set_num_threads(threads_before)
    return lines


def _step_lines(of: measures.Settings, num_threads: int) -> list[measures.Line]:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 1024))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(256, 1024)

    def step_s() -> float:
        def act() -> None:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

        return measures.seconds(act)

    state_dict = measures.state(of.num_bytes, 64)
    ratios, lost_s = [], []
    with measures.scratch(of) as root, measures.checkpointer(root) as checkpointer:
        measures.prepare(checkpointer, state_dict)
        for step in range(1, 2 * of.repeat + 1):
            idle = [step_s() for _ in range(20)]
            handle = checkpointer.save(state_dict, step)
            busy = []
            while not handle.committed.done():
                busy.append(step_s())
            idle += [step_s() for _ in range(20)]
            # Sums, not medians: a step that was held up once counts with all of it.
            ratios.append(statistics.mean(busy) / statistics.mean(idle))
            lost_s.append(sum(busy) - len(busy) * statistics.mean(idle))
    name = f"{num_threads} thread(s)"
    return [
        measures.median_line(f"step while persisting / idle, {name}", ratios, goal=1.05),
        measures.median_line(f"training time that one persist takes, {name}", lost_s, unit="s"),
    ]
