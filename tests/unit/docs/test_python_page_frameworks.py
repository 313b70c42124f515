"""
The whole of: docs/reference/python.md has the public names, signatures and fields of the modules for frameworks.

Called from: pytest. The frameworks are not installed here, so the modules are parsed and not imported.
Must never: judge the words; names and defaults alone.
"""

import ast
import re
from pathlib import Path
from typing import Final

import pytest

from unit.docs.test_python_page import FRAMEWORKS, PAGE, attributes

SOURCE: Final = Path(__file__).parents[3] / "client" / "src" / "pillion"
SIGNATURES: Final = {
    name: signature
    for name, signature in re.findall(r"^#+ ([\w.]+)\n\n```python\n(.+)\n```", PAGE, flags=re.MULTILINE)
    if name.startswith(FRAMEWORKS)
}
"""Heading -> the signature below it."""
Scope = ast.Module | ast.ClassDef


def parsed(module: str) -> ast.Module:
    return ast.parse((SOURCE / f"{module}.py").read_text())


def found(scope: Scope, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next((each for each in scope.body if isinstance(each, kinds) and each.name == name), None)


def shown(heading: str) -> str:
    """A signature as the page writes it: without types, and without `self`."""
    module, *path = heading.split(".")
    file = "lightning_io" if path[0] == "PillionCheckpointIO" else module
    of: ast.Module | ast.ClassDef | ast.FunctionDef | None = parsed(file)
    for name in path:
        assert isinstance(of, Scope), heading
        of = found(of, name)
    if isinstance(of, ast.ClassDef):
        of = found(of, "__init__")
    assert isinstance(of, ast.FunctionDef), heading
    for each in ast.walk(of.args):
        if isinstance(each, ast.arg):
            each.annotation = None
    of.args.args = [each for each in of.args.args if each.arg != "self"]
    return f"{path[-1]}({ast.unparse(of.args)})"


@pytest.mark.parametrize("heading", SIGNATURES)
def test_each_signature_for_a_framework_is_that_of_the_code(heading: str) -> None:
    """A renamed argument or a changed default changes the page."""
    assert SIGNATURES[heading] == shown(heading)


@pytest.mark.parametrize("module", [each.rstrip(".") for each in FRAMEWORKS])
def test_every_public_name_for_a_framework_is_on_the_page(module: str) -> None:
    """Each name of the module's `__all__`."""
    names: list[str] = next(
        ast.literal_eval(each.value)
        for each in parsed(module).body
        if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "__all__"
    )
    assert [name for name in names if f"{module}.{name}" not in PAGE] == []


def test_the_fields_of_the_config_for_torchtitan_are_on_the_page() -> None:
    """Those that Pillion adds, in their order."""
    manager = found(parsed("torchtitan"), "PillionCheckpointManager")
    assert isinstance(manager, ast.ClassDef)
    config = found(manager, "Config")
    assert isinstance(config, ast.ClassDef)
    fields = [ast.unparse(each.target) for each in config.body if isinstance(each, ast.AnnAssign)]
    assert attributes("torchtitan.PillionCheckpointManager") == fields
