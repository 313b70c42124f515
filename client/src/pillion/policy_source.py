"""
The policy of a run without a cluster: which document applies, what it contains, and whether its writer can be found.

Called from: `Checkpointer`, `pillion.dcp`, before the session opens. In a pod the injected sidecar's policy applies instead.
Must never: import YAML, which the trainer may lack. A subprocess of the sidecar's package reads YAML files.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

from pillion import embedded
from pillion.errors import SettingsError, UsageError
from pillion.wire import names, policy

READ_TIMEOUT_S: Final = 60.0
"""Timeout for the subprocess that reads a file. It starts in 0.2 s, and in many seconds on a loaded machine with a cold disk."""


def document(
    given: Mapping[str, Any] | str | os.PathLike[str] | None, environ: Mapping[str, str]
) -> Mapping[str, object] | str | None:
    """
    Return the document that the trainer sends its sidecar: the argument, else ``PILLION_POLICY``. A path is made absolute.

    Raises:
        SettingsError: a mapping is not a policy, or names a writer that cannot be found. Lists all problems.
    """
    if isinstance(given, Mapping):
        try:
            parsed = policy.parse(given, embedded=True)
        except policy.PolicyError as err:
            raise SettingsError([str(problem) for problem in err.problems]) from err
        if parsed.storage.writer is not None and names.ENV_RUNTIME_DIR not in environ:
            try:
                require_module(parsed.storage.writer.name)
            except UsageError as err:
                raise SettingsError([f"storage.writer.name={parsed.storage.writer.name!r}: {err}"]) from err
        return dict(given)
    text = environ.get(names.ENV_POLICY) if given is None else os.fspath(given)
    # A path must be absolute, as the sidecar has another working directory.
    return text if not text or text.lstrip().startswith("{") else os.path.abspath(text)


def read(source: Mapping[str, object] | str | None) -> Mapping[str, Any] | None:
    """
    Return the whole policy of a document, which rank 0 gives to the others. Ranks with different policies would wait for each other.

    Blocks: for a YAML file, up to READ_TIMEOUT_S.

    Returns:
        None: there is no document, or it cannot be read. Opening the session raises the cause, on every rank.
    """
    if not source:
        return None
    try:
        if isinstance(source, str) and not source.lstrip().startswith("{"):
            content = json.loads(_read_by_sidecar(source))
        else:
            content = json.loads(source) if isinstance(source, str) else source
        return policy.dump(policy.parse(content, embedded=True)) if isinstance(content, Mapping) else None
    except (policy.PolicyError, ValueError, RecursionError, OSError, subprocess.SubprocessError):
        return None


def _read_by_sidecar(path: str) -> bytes:
    command = [sys.executable, "-m", "pillion_sidecar", "policy", path]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=READ_TIMEOUT_S,
        check=True,
        cwd="/",
        env=embedded.environment(os.environ),
    )
    return done.stdout


def require_module(writer: str) -> None:
    """
    Check that the module of ``package.module:Class`` is on this process's import path, where an embedded sidecar searches.

    Raises:
        UsageError: the module is missing. The check is early, so that it does not cost the first save.
    """
    module = writer.partition(":")[0]
    if module == "__main__":
        raise UsageError("the sidecar cannot import a class from the script itself: move the class to a module")
    try:
        exists = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        exists = False
    except Exception:  # a boundary: a foreign package that fails to import raises its error in the executor
        return
    if not exists:
        raise UsageError(f"no module named {module}: put its directory on PYTHONPATH, or on sys.path")
