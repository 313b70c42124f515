"""
The environment of these tests: the frameworks beside the same torch as everywhere else.

Called from: pytest.
"""

import importlib.metadata
import re
from pathlib import Path
from typing import Final

import pytest

_REQUIREMENTS: Final = Path(__file__).parents[2] / "requirements"


def _asked() -> dict[str, str]:
    """Return the distributions that frameworks.in asks for by version."""
    lines = (_REQUIREMENTS / "frameworks.in").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.partition("[")[0]: version for name, version in pairs}  # without extras


@pytest.mark.parametrize("name", sorted(_asked()))
def test_every_framework_is_here_at_the_version_that_was_asked_for(name: str) -> None:
    """What frameworks.in pins is what runs here, and no other release."""
    assert importlib.metadata.version(name) == _asked()[name]


def test_the_torch_of_the_frameworks_is_the_torch_of_all_other_tests() -> None:
    """dev.lock and frameworks.lock name one torch, so that what is proven there holds here."""
    pins = {
        name: re.findall(r"^torch==(\S+)", (_REQUIREMENTS / name).read_text(), flags=re.MULTILINE)
        for name in ("dev.lock", "frameworks.lock")
    }
    assert pins["dev.lock"] == pins["frameworks.lock"] == [importlib.metadata.version("torch").partition("+")[0]]
