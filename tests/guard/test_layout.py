"""
The whole of: the layout rules that would break the repository silently, each as a test.

Called from: pytest.
Must never: look at what git ignores.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from guard import repository
from support import deadlines

LIMIT_S: Final = deadlines.Deadline.PROCESS_START.s
WALL_LINES: Final = 500
NOT_NAMES: Final = frozenset({"utils", "util", "common", "helpers", "helper", "manager", "managers", "misc"})


def test_operator_is_still_the_standard_librarys() -> None:
    """Python started in the root, where a folder `operator/` is, gets the standard library's `operator`."""
    code = "import sys; sys.path.insert(0, ''); import operator; print(operator.itemgetter(1)('ab'), operator.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=repository.ROOT, capture_output=True, text=True, check=True
    )
    answer, where = done.stdout.split()
    assert answer == "b"
    assert not Path(where).is_relative_to(repository.ROOT / "operator")


@pytest.mark.parametrize("distribution", repository.DISTRIBUTIONS)
def test_no_distribution_folder_is_a_package(distribution: str) -> None:
    """The folders client/, sidecar/ and operator/ hold no `__init__.py`, and no tests folder is called operator."""
    assert not (repository.ROOT / distribution / "__init__.py").exists()
    assert not (repository.ROOT / distribution / "src" / "__init__.py").exists()
    assert not (repository.ROOT / "tests" / "operator").exists()


def test_no_module_is_longer_than_the_wall() -> None:
    """Every module fits in a head: at most 500 lines."""
    lengths = {
        str(path.relative_to(repository.ROOT)): len(path.read_text().splitlines()) for path in repository.python_files()
    }
    assert {name: length for name, length in lengths.items() if length > WALL_LINES} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    """No module or package is called utils, helpers, manager, common or the like."""
    bad = [
        path
        for path in repository.python_files()
        if NOT_NAMES & {path.stem, *path.relative_to(repository.ROOT).parts[:-1]}
    ]
    assert bad == []


def test_every_module_says_what_it_is() -> None:
    """Every module has a docstring."""
    silent = [path for path in repository.python_files() if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []


def test_wire_can_be_imported_without_torch() -> None:
    """The supervisor and the operator read the wire contract in an interpreter that never loads torch."""
    code = "import sys; import pillion.wire; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=LIMIT_S)
    assert done.stdout.strip() == "False"
