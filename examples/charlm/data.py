"""
The whole of: the text that the example learns, and which part of it a rank sees in a step.

Called from: train.py, on every rank.
Must never: keep a position. A batch is a function of (seed, step, rank), so that a run that resumes sees what the run that
was killed would have seen, and there is no reader whose state would have to be saved.
"""

import sysconfig
from pathlib import Path

import torch

TEXT_BYTES_MAX = 4_000_000


def load(limit_bytes: int = TEXT_BYTES_MAX) -> torch.Tensor:
    """
    The sources of Python's own standard library, in the order of their names, as ASCII codes (uint8).

    Nothing is downloaded. What is not ASCII becomes "?".
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    chunks: list[bytes] = []
    num_bytes = 0
    for path in sorted(library.glob("*.py")) + sorted(library.glob("asyncio/*.py")):
        chunk = path.read_text(encoding="utf-8", errors="replace").encode("ascii", errors="replace")
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes >= limit_bytes:
            break
    return torch.frombuffer(bytearray(b"".join(chunks)[:limit_bytes]), dtype=torch.uint8)


def batch(
    text: torch.Tensor, *, seed: int, step: int, rank: int, num_rows: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Input and target of one step on one rank: num_rows x context each, the target one character further.

    Draws from a generator of its own, so torch's global one is left to the dropout.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 1_009 + rank)
    starts = torch.randint(len(text) - context - 1, (num_rows,), generator=generator)
    rows = torch.stack([text[start : start + context + 1] for start in starts.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]
