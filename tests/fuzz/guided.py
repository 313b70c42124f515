"""
The whole of: the same targets, led by coverage: libFuzzer, through atheris, keeps the inputs that reach new code, and our mutator makes
the next ones of them.

Called from: `__main__` with `--guided`. atheris has wheels for x86-64 only, so that it is no requirement of this repository:
`.venv/bin/python -m pip install atheris`.
Must never: be needed: what it finds becomes a file of the corpus, which runs without it.
"""

import contextlib
import importlib
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from fuzz import engine
from fuzz.mutate import Mutator
from fuzz.targets import Target, temporary_folder

INSTRUMENTED: Final = ("pillion", "pillion_sidecar", "pillion_operator")
LONGEST_BYTES: Final = 1 << 16
"""Of an input: longer ones reach nothing that shorter ones do not, and the bounds are tried without guidance."""


def instrumented() -> contextlib.AbstractContextManager[Any]:
    """
    Modules of the product that are imported within it are instrumented.

    Raises:
        ModuleNotFoundError: atheris is not installed.
    """
    atheris: Any = importlib.import_module("atheris")
    return atheris.instrument_imports(include=list(INSTRUMENTED))  # type: ignore[no-any-return]  # it ships no types


def run(
    target: Target,
    corpus: Sequence[bytes],
    *,
    runs: int,
    seed: int,
    journal: engine.Journal,
    done: Callable[[engine.Outcome], None],
) -> None:
    """
    As `engine.run`, led by coverage. libFuzzer ends the process by itself, so that `done` is called before, and this never returns.
    """
    atheris: Any = importlib.import_module("atheris")
    outcome, seen, stack = engine.Outcome(target.name), set[str](), contextlib.ExitStack()
    feed, folder = target.make(stack), temporary_folder(stack)
    for number, data in enumerate(corpus):
        (folder / str(number)).write_bytes(data)
    begun = time.perf_counter()

    def one(data: bytes) -> None:
        journal.write(outcome.inputs, data)
        finding, is_accepted = engine.judge(feed, target, data, outcome)
        outcome.accepted += is_accepted
        if finding is not None and finding.kind not in seen:
            seen.add(finding.kind)
            outcome.findings.append(finding)
        if outcome.inputs >= runs or len(outcome.findings) >= engine.MAX_FINDINGS:
            outcome.elapsed_s = time.perf_counter() - begun
            done(outcome)
            stack.close()
            os._exit(0)

    def mutated(data: bytes, longest: int, number: int) -> bytes:
        mutator = Mutator(random.Random(number), target.words, target.split)
        return mutator.mutate(bytes(data), corpus[number % len(corpus)], is_json=target.is_json)[:longest]

    with engine.alarms():
        arguments = [f"-seed={seed}", f"-max_len={LONGEST_BYTES}", "-rss_limit_mb=0", "-timeout=0", "-handle_alrm=0"]
        atheris.Setup(["fuzz", *arguments, "-verbosity=0", "-runs=-1", str(folder)], one, custom_mutator=mutated)
        atheris.Fuzz()
