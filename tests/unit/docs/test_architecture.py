"""
The whole of: that ARCHITECTURE.md's lists are those of the code: layers, broad excepts, and the names that it points to.

Called from: pytest.
Must never: list a module by hand; the code and pyproject.toml have them.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[3]
TEXT: Final = (ROOT / "ARCHITECTURE.md").read_text()
SOURCES: Final = {
    "pillion": ROOT / "client" / "src" / "pillion",
    "pillion_sidecar": ROOT / "sidecar" / "src" / "pillion_sidecar",
    "pillion_operator": ROOT / "operator" / "src" / "pillion_operator",
}
CONTRACTS: Final[list[dict[str, Any]]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]

NO_PLACE: Final = re.compile(r"torch\.|last_load\.|.*\.(md|json|py|toml|lock|log|arena)$")
"""What has a dot and is no place in the code: torch's names, an attribute that users read, files."""


def modules(package: str) -> Iterator[tuple[str, str]]:
    """The modules of a package as the page names them (``executor.load``), and their source."""
    for path in sorted(SOURCES[package].rglob("*.py")):
        parts = path.relative_to(SOURCES[package]).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), path.read_text()


def is_swallowed(handler: ast.ExceptHandler) -> bool:
    """Whether everything is caught and not raised again as it is."""
    named = isinstance(handler.type, ast.Name) and handler.type.id in ("Exception", "BaseException")
    return named and not any(isinstance(each, ast.Raise) and each.exc is None for each in ast.walk(handler))


@pytest.mark.parametrize("package", SOURCES)
def test_the_layers_are_those_of_the_contract(package: str) -> None:
    """The same modules in each layer, from the top, as import-linter checks them."""
    (contract,) = [each for each in CONTRACTS if each["type"] == "layers" and each.get("containers") == [package]]
    expected = [{each.strip(" ()") for each in layer.split("|")} for layer in contract["layers"]]
    block = TEXT.partition("## Layers")[2].partition("```")[2].partition("```")[0]
    own = re.search(rf"^{package}:(.*?)(?=^\w|\Z)", block, flags=re.MULTILINE | re.DOTALL)
    assert own is not None
    assert [{each.strip() for each in layer.split("|")} for layer in own[1].split(">")] == expected


def test_every_broad_except_is_in_the_list() -> None:
    """One that is nowhere told hides a defect; one that is told and gone misleads."""
    sentence = TEXT.partition("A broad `except` stands only")[2].partition("\n\n")[0]
    told = set(re.findall(r"`([\w.]+)`", sentence))
    found = {
        name
        for package in SOURCES
        for name, source in modules(package)
        if any(isinstance(each, ast.ExceptHandler) and is_swallowed(each) for each in ast.walk(ast.parse(source)))
    }
    assert sorted(told) == sorted(found)


def test_the_callers_that_a_module_names_exist() -> None:
    """`Called from:` is how a reader goes upwards. It names modules, classes, or what the module itself defines, and no room of yesterday."""
    sources = [each for package in SOURCES for each in modules(package)]
    known = [f".{name}" for name, _ in sources]
    classes = {name for _, source in sources for name in re.findall(r"^class (\w+)", source, re.MULTILINE)}
    missing = []
    for module, source in sources:
        told = re.search(r"Called from:(.*?)(?:\.\s|\Z|\n\n)", ast.get_docstring(ast.parse(source)) or "", re.DOTALL)
        for full in re.findall(r"`([a-zA-Z_][\w.]*)`", told[1] if told else ""):
            name = re.sub(r"^pillion(_sidecar|_operator)?\.", "", full)
            holder, _, last = name.rpartition(".")
            is_own = not holder and re.search(rf"(?:def|class) {last}\b|\b{last}\b.*=|import.*\b{last}\b", source)
            is_within = any(
                (f".{each}".endswith(f".{holder}") or re.search(rf"^class {holder}\b", text, re.MULTILINE))
                and re.search(rf"(?:def|class) {last}\b", text)
                for each, text in sources
            )
            is_known = name in classes or name in SOURCES or any(each.endswith(f".{name}") for each in known)
            if not (is_known or is_own or is_within):
                missing.append((module, full))
    assert not missing, missing


def test_the_files_that_it_names_exist() -> None:
    """A path may begin at any folder of a package; `...` stands for its way there."""
    files = [str(path) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    named = set(re.findall(r"`(?:[\w.-]+/\.\.\./)?([\w/-]+\.py)`", TEXT))
    assert len(named) > 50
    assert sorted(name for name in named if not any(file.endswith(f"/{name}") for file in files)) == []


def test_the_places_that_it_names_exist() -> None:
    """`module.name` and `Class.method` are where the tables say."""
    sources = [each for package in SOURCES for each in modules(package)]
    packages = {name.rpartition(".")[0] for name, _ in sources}
    missing = []
    for told in sorted(set(re.findall(r"`((?:\w+\.)+\w+)`", TEXT))):
        name = re.sub(r"^pillion(_sidecar|_operator)?\.", "", told)
        if NO_PLACE.match(told) or name in packages or any(f".{known}".endswith(f".{name}") for known, _ in sources):
            continue
        holder, _, last = name.rpartition(".")
        within = [source for known, source in sources if f".{known}".endswith(f".{holder}")]
        within += [source for _, source in sources if re.search(rf"^class {holder}\b", source, re.MULTILINE)]
        if not any(re.search(rf"(?:def|class) {last}\b|^{last}\b", source, re.MULTILINE) for source in within):
            missing.append(told)
    assert missing == []
