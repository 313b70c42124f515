"""
The whole of: the fixtures of this level, and that its files are not imported where the frameworks are not.

Called from: pytest.
Must never: be imported by name.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest

from process.ranks import ranks, warm

__all__ = ["ranks", "warm"]


class _Elsewhere(pytest.Module):
    """A file whose tests run in another environment."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        pytest.skip("needs the frameworks: make test-frameworks", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """
    Skips each file as a whole, unless this is the environment of the frameworks.
    """
    if parent.config.getoption("--frameworks"):
        return None
    return _Elsewhere.from_parent(parent, path=module_path)
