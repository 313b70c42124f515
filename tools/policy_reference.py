"""
Makes the tables of docs/reference/policy.md from the CRD: ``python tools/policy_reference.py`` writes them, ``--check`` compares them.

The whole of: how a field of the schema becomes a row. The tables stand between two markers; people write the text around them.
Called from: people, after a change in crds/; tests/unit/docs/test_policy_page.py, which compares.
Must never: describe a field in words that the CRD does not have.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "crds" / "pillion.dev_checkpointpolicies.yaml"
PAGE: Final = ROOT / "docs" / "reference" / "policy.md"
BEGIN: Final = "<!-- policy: generated -->"
END: Final = "<!-- policy: end -->"
HEAD: Final = "| field | allowed | default | meaning |\n|---|---|---|---|\n"

Schema = dict[str, Any]


def spec() -> Schema:
    """The schema of a policy's `spec`."""
    (version,) = yaml.safe_load(SOURCE.read_text())["spec"]["versions"]
    found: Schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return found


def tables() -> str:
    """One table of the fields that stand alone, then a section for each field with fields of its own."""
    schema = spec()
    fields: dict[str, Schema] = schema["properties"]
    alone = [
        _row(name, each, each.get("default"), is_required=False)
        for name, each in fields.items()
        if "properties" not in each
    ]
    parts = ["## Single fields\n\n" + HEAD + "".join(alone)]
    for name, each in fields.items():
        if "properties" not in each:
            continue
        required = " Required in a cluster." if name in schema["required"] else ""
        rules = "".join(f"- {text}\n" for text in _rules(each, name))
        parts.append(
            f"## {name}\n\n{_sentence(each)}{required}\n\n{HEAD}{''.join(_rows(each, each.get('default', {})))}"
            + (f"\nThe API server refuses a policy that breaks one of these rules:\n\n{rules}" if rules else "")
        )
    return "\n".join(parts)


def _rows(schema: Schema, defaults: Schema, prefix: str = "") -> Iterator[str]:
    """The rows of all fields below. A default of the whole is a default of each field in it."""
    for name, each in schema["properties"].items():
        default = defaults.get(name, each.get("default"))
        yield _row(f"{prefix}{name}", each, default, is_required=name in schema.get("required", ()))
        if "properties" in each:
            yield from _rows(each, default or {}, f"{prefix}{name}.")
        elif "properties" in each.get("items", {}):
            yield from _rows(each["items"], {}, f"{prefix}{name}[].")


def _row(name: str, schema: Schema, default: object, *, is_required: bool) -> str:
    shown = "required" if is_required else "" if "properties" in schema else _default(default)
    return f"| `{name}` | {_allowed(schema)} | {shown} | {_sentence(schema)} |\n"


def _allowed(schema: Schema) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return "a quantity"
    kind: str = schema["type"]
    if kind == "integer":
        least, most = schema.get("minimum"), schema.get("maximum")
        return f"{least} to {most}" if most is not None else f"{least} or more" if least is not None else "a number"
    return {"boolean": "`true`, `false`", "string": "text", "array": "a list", "object": "fields"}[kind]


def _default(value: object) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _sentence(schema: Schema) -> str:
    text: str = schema["description"]
    return " ".join(text.split()).replace("|", "\\|")


def _rules(schema: Schema, name: str) -> Iterator[str]:
    yield from (f"`{name}`: {each['message']}" for each in schema.get("x-kubernetes-validations", ()))
    for key, each in schema.get("properties", {}).items():
        yield from _rules(each, f"{name}.{key}")
    if "items" in schema:
        yield from _rules(schema["items"], f"{name}[]")


def rendered(page: str) -> str:
    """The page with today's tables between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main() -> int:
    """Write, or check; the exit status is 1 when the page differs from the CRD."""
    parser = argparse.ArgumentParser(description="Make the tables of docs/reference/policy.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; report whether the page differs")
    check = parser.parse_args().check
    page = PAGE.read_text()
    text = rendered(page)
    if text == page:
        return 0
    print(f"{PAGE.relative_to(ROOT)} {'differs from the CRD' if check else 'written'}")
    if not check:
        PAGE.write_text(text)
    return int(check)


if __name__ == "__main__":
    sys.exit(main())
