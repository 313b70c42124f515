"""
Count what shows whether this code is still easy to live in, for each package: `python tools/counts.py` prints the table of docs/records/counts.md.

The rules behind the numbers are tests and contracts (tests/guard, pyproject.toml); this is for comparing one year with the next.
"""

import ast
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "client": ROOT / "client/src/pillion",
    "sidecar": ROOT / "sidecar/src/pillion_sidecar",
    "operator": ROOT / "operator/src/pillion_operator",
}
LONG_FUNCTION_LINES = 60
MANY_METHODS = 15
MANY_ARGUMENTS = 6
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Package:
    """The sources of one distribution."""

    def __init__(self, folder: Path) -> None:
        self.texts = {path: path.read_text() for path in sorted(folder.rglob("*.py"))}
        self.trees = {path: ast.parse(text) for path, text in self.texts.items()}
        self.lengths = sorted(count for count in (len(text.splitlines()) for text in self.texts.values()) if count >= 5)

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        for tree in self.trees.values():
            yield from (node for node in ast.walk(tree) if isinstance(node, kinds))

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [node for node in self.nodes(*FUNCTIONS) if isinstance(node, FUNCTIONS)]


def _lines(package: Package) -> str:
    return f"{len(package.lengths)} / {sum(package.lengths):,}"


def _spread(package: Package) -> str:
    p90 = package.lengths[int(len(package.lengths) * 0.9)]
    return f"{statistics.median(package.lengths):.0f} / {p90} / {package.lengths[-1]}"


def _long_functions(package: Package) -> str:
    return str(sum((each.end_lineno or 0) - each.lineno + 1 > LONG_FUNCTION_LINES for each in package.functions()))


def _large_classes(package: Package) -> str:
    counts = [
        (sum(isinstance(each, FUNCTIONS) for each in node.body), node.name)
        for node in package.nodes(ast.ClassDef)
        if isinstance(node, ast.ClassDef)
    ]
    return (
        ", ".join(f"{name} {count}" for count, name in sorted(counts, reverse=True) if count > MANY_METHODS) or "none"
    )


def _many_arguments(package: Package) -> str:
    def count(arguments: ast.arguments) -> int:
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return sum(each.arg not in ("self", "cls") for each in named)

    return str(sum(count(each.args) > MANY_ARGUMENTS for each in package.functions()))


def _ignores(package: Package) -> str:
    text = "\n".join(package.texts.values())
    return f"{text.count('type: ignore')} / {text.count('noqa')}"


def _broad_excepts(package: Package) -> str:
    kinds = [
        node.type.id
        for node in package.nodes(ast.ExceptHandler)
        if isinstance(node, ast.ExceptHandler) and isinstance(node.type, ast.Name)
    ]
    return f"{kinds.count('Exception') + kinds.count('BaseException')} ({kinds.count('BaseException')})"


def _docstrings(package: Package) -> str:
    public = [
        node
        for node in package.nodes(ast.ClassDef, *FUNCTIONS)
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and not node.name.startswith("_")
    ]
    documented = sum(ast.get_docstring(node) is not None for node in public)
    without = sum(ast.get_docstring(tree) is None for tree in package.trees.values())
    return f"{100 * documented // len(public)} / {without}"


def _returns(package: Package) -> str:
    functions = package.functions()
    return str(100 * sum(each.returns is not None for each in functions) // len(functions))


def _writes(package: Package) -> str:
    """Assignments to an attribute of anything but `self`."""
    count = 0
    for node in package.nodes(ast.Assign, ast.AugAssign, ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined] # the other two have one
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            count += sum(
                isinstance(part, ast.Attribute) and not (isinstance(part.value, ast.Name) and part.value.id == "self")
                for part in parts
            )
    return str(count)


ROWS: dict[str, Callable[[Package], str]] = {
    "modules of 5 lines and more / lines": _lines,
    "lines of a module: median / p90 / most": _spread,
    f"functions over {LONG_FUNCTION_LINES} lines": _long_functions,
    f"classes of more than {MANY_METHODS} methods": _large_classes,
    f"functions of more than {MANY_ARGUMENTS} arguments": _many_arguments,
    "`type: ignore` / `noqa`": _ignores,
    "broad except (of these BaseException)": _broad_excepts,
    "public docstrings, % / modules without": _docstrings,
    "return annotations, %": _returns,
    "writes to another object's attribute": _writes,
}


def main() -> None:
    """Print the table, for the files as they lie here."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    packages = {name: Package(folder) for name, folder in PACKAGES.items()}
    out = [f"Commit {commit}.", "", f"| | {' | '.join(packages)} |", "|---|" + "---|" * len(packages)]
    out += [f"| {row} | {' | '.join(count(each) for each in packages.values())} |" for row, count in ROWS.items()]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
