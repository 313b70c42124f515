"""
Reads a document into the sections of a policy, writes sections back, and describes the problems of an invalid document.

Called from: `policy`, which has the fields. A section is a frozen dataclass. A field's annotation and metadata define its allowed values.
Breaking changes: refusing a document that was accepted before. `policy` has the rest of the contract.

Must never: stop at the first problem, or compute or print more than the size of the document justifies.
"""

import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import NoneType
from typing import Any, Final, NamedTuple, cast, get_args, get_origin, get_type_hints

from pillion.wire.quantities import INT64_MAX

_MAX_DEPTH: Final = 32
"""Maximum nesting of objects and lists in a writer's arguments. Reading and writing recurse into all of them."""
MAX_VALUES: Final = 10_000
"""Maximum values in a writer's arguments, keys not counted. Every pod carries the policy, and every reader copies all of them."""
MAX_PROBLEMS: Final = 100
"""Maximum problems before unknown fields and arguments are no longer reported. A document may have a hundred thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyProblem:
    """One thing in a policy document that is not allowed."""

    path: str
    """The field, dotted, as the document spells it; ``spec.`` in front when the document is a whole object."""
    value: object
    """The value in the document. None: the field was absent."""
    allowed: str
    """Description of the allowed values."""

    def __str__(self) -> str:
        # reprlib shortens the value, which could flood a log. The path identifies the field.
        shown = "nothing" if self.value is None else reprlib.repr(_without_credentials(self.value))
        return f"{self.path}: got {shown}; allowed: {self.allowed}"


class PolicyError(ValueError):
    """A document is not a valid policy. ``problems`` and the message have all of its problems."""

    def __init__(self, problems: tuple[PolicyProblem, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(["this checkpoint policy cannot be used:", *(f"  {each}" for each in problems)]))


def _without_credentials(value: object) -> object:
    """A value as messages show it: what stands between the scheme and the host of a URL may be a password."""
    if isinstance(value, str) and "@" in value:
        before, _, after = value.rpartition("@")
        scheme, slashes, _ = before.partition("://")
        return f"{scheme}://...@{after}" if slashes else value
    return value


def text_rule(allowed: str, pattern: str) -> dict[str, object]:
    """Metadata of a field that is a text: the description of the allowed values, and the regular expression that they match as a whole."""
    return {"allowed": allowed, "pattern": re.compile(pattern)}


class Broken(NamedTuple):
    """A violated rule between the fields ``about``, reported at the field ``name``. It is dropped if one of these fields is invalid itself."""

    about: tuple[str, ...]
    name: str
    value: object
    allowed: str


class Section:
    """An object in the document. Fields are read by annotation. The minimum of a whole number is 1, unless its metadata sets another."""

    __slots__ = ()

    def broken(self, embedded: bool) -> Iterator[Broken]:
        yield from ()


class Reading:
    """Reads one document, and collects all of its problems."""

    def __init__(self, embedded: bool) -> None:
        self.embedded = embedded
        self.problems: list[PolicyProblem] = []
        self._values = 0
        """Number of values of the arguments that are being read."""

    def refuse(self, path: str, value: object, allowed: str) -> None:
        self.problems.append(PolicyProblem(path=path or "document", value=value, allowed=allowed))

    def section(self, kind: type[Section], path: str, value: object) -> Section | None:
        """Read an object of the document as a section. A refused field has its default or None."""
        names = field_names(kind)
        if not isinstance(value, Mapping):
            self.refuse(path, value, "an object with the fields " + ", ".join(names))
            return None
        at = f"{path}." if path else ""
        given, doubtful = dict[str, object](), set[str]()
        for key, each in value.items():
            if key not in names and len(self.problems) < MAX_PROBLEMS:
                hint, meant = nearest(key, names)
                self.refuse(f"{at}{key}", each, hint)
                doubtful |= {names[meant].name} if meant else set()
            elif each is not None and key in names:
                num_problems = len(self.problems)
                taken = self.value(kind, names[key], f"{at}{key}", each)
                if len(self.problems) == num_problems:
                    given[names[key].name] = taken
                else:
                    doubtful.add(names[key].name)
        for name, spec in names.items():
            if isinstance(spec.default, Section) and not {spec.name} & (given.keys() | doubtful):
                self.section(type(spec.default), f"{at}{name}", {})  # For its rules: an absent section may violate one.
            elif spec.default is spec.default_factory is dataclasses.MISSING and spec.name not in given:
                if spec.name not in doubtful:
                    self.refuse(f"{at}{name}", None, spec.metadata.get("allowed", "an object"))
                given[spec.name] = None
        section = kind(**given)
        for broken in section.broken(self.embedded):
            if doubtful.isdisjoint(broken.about):
                self.refuse(f"{at}{broken.name}".rstrip("."), broken.value, broken.allowed)
        return section

    def value(self, section: type[Section], spec: dataclasses.Field[Any], path: str, value: object) -> object:
        """Read a value of the document by the field's annotation. After a refusal the result has no meaning."""
        hint, rule = get_type_hints(section)[spec.name], spec.metadata
        if get_origin(hint) is tuple:
            return self.sections(get_args(hint)[0], path, value, rule["most"])
        kind = next((each for each in get_args(hint) if hint == each | None), hint)
        if isinstance(kind, type) and issubclass(kind, Section):
            return self.section(kind, path, value)
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            if isinstance(value, str) and value in list(kind):
                return kind(value)
            self.refuse(path, value, "one of " + ", ".join(kind))
        elif "unit" in rule:
            unit, least, most = rule["unit"], rule.get("least", 1), rule.get("most", INT64_MAX)
            try:
                if least <= (amount := unit.parse(value)) <= most:
                    return amount
            except ValueError:
                pass  # The unit describes what is allowed, for this case and for zero.
            span = f", of at least {unit.format(least)}" if least > 1 else ""
            span += f", of at most {unit.format(most)}" if most < INT64_MAX else ""
            self.refuse(path, value, unit.allowed + span)
        elif kind is str:
            if not isinstance(value, str) or rule["pattern"].fullmatch(value) is None:
                self.refuse(path, value, rule["allowed"])
        elif kind is bool:
            if not isinstance(value, bool):
                self.refuse(path, value, "true or false")
        elif kind is int:
            least, most = rule.get("least", 1), rule.get("most", INT64_MAX)
            # In Python a bool is an int; for the API server it is not.
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                span = f"of at least {least}" if most == INT64_MAX else f"from {least} to {most}"
                self.refuse(path, value, f"a whole number {span}")
        elif isinstance(value, Mapping):
            self._values = 0
            return self.json(path, value)
        else:
            self.refuse(path, value, "an object of named values")
        return value

    def sections(self, kind: type[Section], path: str, value: object, most: int) -> object:
        """Read a list of objects of one kind."""
        if not isinstance(value, list | tuple) or len(value) > most:
            self.refuse(path, value, f"a list of at most {most} objects")
            return ()
        return tuple(self.section(kind, f"{path}[{index}]", each) for index, each in enumerate(value))

    def json(self, path: str, value: object, depth: int = 0) -> object:
        """Return a deep copy of a JSON value, so that a later change of the document does not reach the frozen policy."""
        self._values += 1
        if self._values > MAX_VALUES:
            if self._values == MAX_VALUES + 1:
                self.refuse(path, None, f"at most {MAX_VALUES} values")
            return None
        if depth > _MAX_DEPTH:
            self.refuse(path, None, f"at most {_MAX_DEPTH} objects and lists within each other")
            return None
        if isinstance(value, Mapping):
            for key in (each for each in value if not isinstance(each, str)):
                self.refuse(path, key, "strings as keys")
            return {key: self.json(f"{path}.{key}", each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.json(f"{path}[{index}]", each, depth + 1) for index, each in enumerate(value)]
        if isinstance(value, NoneType | str | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if len(self.problems) < MAX_PROBLEMS:
            self.refuse(path, value, "a JSON value: null, true, false, a finite number, a string, a list, an object")
        return None


def plain(value: object) -> object:
    """
    Return a section as JSON values that share nothing with it. None is left out.

    Defaults with the metadata `unsaid` are left out as well: older sidecars and clients refuse a document with a field that they do not
    know.
    """
    if isinstance(value, Section):
        pairs = [
            (name, spec)
            for name, spec in field_names(type(value)).items()
            if not (spec.metadata.get("unsaid") and getattr(value, spec.name) == spec.default)
        ]
        fields = ((name, spec.metadata.get("unit"), getattr(value, spec.name)) for name, spec in pairs)
        return {name: unit.format(each) if unit else plain(each) for name, unit, each in fields if each is not None}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.value if isinstance(value, StrEnum) else value


def field_names(kind: type[Section]) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of a section by their names in the document: camelCase, or the name in the metadata."""
    fields = dataclasses.fields(cast("Any", kind))
    return {
        field.metadata.get("name", re.sub("_(.)", lambda match: match[1].upper(), field.name)): field
        for field in fields
    }


def nearest(name: object, allowed: Collection[str]) -> tuple[str, str | None]:
    """Return a hint about an unknown field, and the allowed field that was probably meant."""
    folded = {each.lower(): each for each in allowed}
    # Folding equates `period_steps` and `PeriodSteps` with `periodSteps`. Any other difference is a typo.
    near = difflib.get_close_matches(re.sub("[_-]", "", str(name)).lower(), folded, n=1)
    meant = folded[near[0]] if near else None
    return (f"did you mean {meant}? " if meant else "") + "the fields " + ", ".join(allowed), meant
