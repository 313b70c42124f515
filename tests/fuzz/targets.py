"""
The whole of: what is fuzzed: each thing that a stranger can reach, as a function of bytes, and the one error that it may raise.

Called from: `engine`, `guided`, and the tests, which replay the corpora.
Must never: catch more than what the module under test documents; check less than what it promises of an accepted input.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CORPORA: Final = Path(__file__).parent / "corpus"

HEXADECIMAL: Final = ".hex"
"""Suffix of files of the corpus that are no text: the repository's text files are ASCII."""

Feed = Callable[[bytes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One thing that strangers can reach."""

    name: str
    """Also the folder of its corpus."""
    make: Callable[[contextlib.ExitStack], Feed]
    """Makes the function. What it needs (a folder, an event loop) is made once, and ends with the stack."""
    allowed: tuple[type[Exception], ...]
    """What it may raise: the documented error of the module under test."""
    seeds: Callable[[], list[bytes]]
    """Inputs that are right, from the product's own encoders, so that they never go out of date."""
    is_json: bool = True
    weight: float = 1.0
    """Share of the runs: what is slower, or shallow, has fewer."""
    words: tuple[str, ...] = ()
    """Keys and values that the code under test knows."""
    split: Callable[[bytes], list[bytes]] | None = None
    """Cuts an input into pieces, for a format whose pieces mean something and whose bytes alone do not."""

    def corpus(self) -> list[bytes]:
        """The seeds, and every file of the corpus: inputs that once were findings."""
        folder = CORPORA / self.name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return self.seeds() + [_content(path) for path in files]


def _content(path: Path) -> bytes:
    """An input: a file as it is, or, where it is no text, written in hexadecimal digits."""
    return bytes.fromhex(path.read_text()) if path.suffix == HEXADECIMAL else path.read_bytes()


def temporary_folder(stack: contextlib.ExitStack) -> Path:
    """A folder in memory where there is one, which ends with the stack."""
    in_memory = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="fuzzed-pillion-", dir=in_memory if in_memory.is_dir() else None)
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def all_targets() -> tuple[Target, ...]:
    """Every target, in the order in which they run."""
    # Imported here: a process that runs one target of the operator need not have the sidecar's modules, and the other way round.
    from fuzz import control_targets, operator_targets, storage_targets

    return (*control_targets.TARGETS, *storage_targets.TARGETS, *operator_targets.TARGETS)


def find(name: str) -> Target:
    """
    Raises:
        KeyError: there is none of that name.
    """
    return {each.name: each for each in all_targets()}[name]
