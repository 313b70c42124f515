"""
The whole of: docs/reference/python.md has the public names, signatures and attributes of the code.

Called from: pytest.
Must never: judge the words; names and defaults alone.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import pillion
from pillion import dcp, state
from pillion.errors import PillionError, RemoteFailure
from pillion.handle import Checkpoint, Found, LoadReport, SaveHandle

PAGE: Final = (Path(__file__).parents[3] / "docs" / "reference" / "python.md").read_text()
FRAMEWORKS: Final = ("transformers.", "accelerate.", "lightning.", "torchtitan.")
"""Headings of test_python_page_frameworks.py."""
SIGNATURES: Final = {
    name: signature
    for name, signature in re.findall(r"^#+ ([\w.]+)\n\n```python\n(.+)\n```", PAGE, flags=re.MULTILINE)
    if not name.startswith(FRAMEWORKS)
}
"""Heading -> the signature below it."""
INTERNAL: Final = {
    "inherited",
    "examined",
    "incomplete",
    "note_examined",
    "resolve",
    "resolve_staged",
    "fail",
    "for_disk",
    "claiming",
    "awaited",
    "resolve_held",
}
"""Names of a handle that only the library uses."""


def called(name: str) -> Callable[..., Any]:
    """What a heading names: a function of `pillion.dcp` or `pillion.state`, a class, or a method of one."""
    if name.startswith("dcp."):
        found: Callable[..., Any] = getattr(dcp, name.removeprefix("dcp."))
        return found
    module = state if name.startswith("state.") else pillion
    holder, _, method = name.removeprefix("state.").partition(".")
    kind: type[Any] = getattr(module, holder)
    of: Callable[..., Any] = getattr(kind, method) if method else kind
    return of


def shown(name: str) -> str:
    """A signature as the page writes it: without types, and without `self`."""
    of = inspect.signature(called(name))
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in of.parameters.values()]
    text = str(of.replace(parameters=[each for each in parameters if each.name != "self"], return_annotation=of.empty))
    text = re.sub(r"<AsyncCheckpointerType\.(\w+): .*?>", r"AsyncCheckpointerType.\1", text)
    return name.rpartition(".")[2] + text.replace("=<factory>", "={}")


def attributes(heading: str) -> list[str]:
    """The first column of the table below a heading."""
    section = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    return re.findall(r"^\| `(\w+)` \|", section[1], flags=re.MULTILINE)


@pytest.mark.parametrize("name", SIGNATURES)
def test_each_signature_is_that_of_the_code(name: str) -> None:
    """A renamed argument or a changed default changes the page."""
    assert SIGNATURES[name] == shown(name)


def test_every_public_method_has_a_signature_on_the_page() -> None:
    """A method that a script may call is on the page."""
    public = {
        f"{kind.__name__}.{name}"
        for kind in (pillion.Checkpointer, SaveHandle)
        for name, value in vars(kind).items()
        if inspect.isfunction(value) and not name.startswith("_") and name not in INTERNAL
    }
    assert public == {name for name in SIGNATURES if re.match(r"Checkpointer\.|SaveHandle\.", name)}


def test_every_public_name_is_on_the_page() -> None:
    """Each name of `pillion.__all__`, `pillion.dcp.__all__` and `pillion.state.__all__`, and of the errors no other."""
    named = {*re.findall(r"^#+ (\w+)$", PAGE, flags=re.MULTILINE), *attributes("Errors")}
    assert set(pillion.__all__) <= named
    assert all(f"dcp.{name}" in PAGE for name in dcp.__all__)
    assert all(f"state.{name}" in PAGE for name in state.__all__)


def test_each_error_has_its_base() -> None:
    """The column `is a` is the class that the error derives from."""
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    errors = {
        name: kind.__base__.__name__
        for name in pillion.__all__
        if name != "Checkpointer"
        and isinstance(kind := getattr(pillion, name), type)
        and issubclass(kind, PillionError)
        and kind.__base__ is not None
    }
    assert rows == errors


@pytest.mark.parametrize("kind", [Checkpoint, Found, LoadReport, RemoteFailure])
def test_each_attribute_of_a_result_is_on_the_page(kind: type[Any]) -> None:
    """The tables have the fields of the class, in their order."""
    assert attributes(kind.__name__) == [each.name for each in dataclasses.fields(kind)]


def test_each_attribute_of_a_handle_is_on_the_page() -> None:
    """The table has the attributes that a new handle has."""
    own = [name for name in vars(SaveHandle(1)) if not name.startswith("_") and name not in INTERNAL]
    assert attributes("SaveHandle") == own
