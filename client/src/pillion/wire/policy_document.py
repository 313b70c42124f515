"""
The whole of: how a document becomes sections of a policy, and how they are written back; and what is said of one that cannot be used.

Called from: `policy`, which has the fields. A section is a frozen dataclass: a field's annotation and metadata say what it may hold.
Breaking changes: refusing what was read. The rest of the contract stands in `policy`.

Must never: stop at the first problem; compute, or say, more than the size of the document deserves.
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

_DEPTH_MOST: Final = 32
"""Objects and lists within each other in a writer's arguments: reader and writer go down all of them."""
PROBLEMS_MOST: Final = 100
"""Problems after which unknown fields, and arguments, are not looked at any more: a document may have a hundred thousand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyProblem:
    """One thing in a policy document that is not allowed."""

    path: str
    """The field, dotted, as the document spells it; ``spec.`` in front when the document is a whole object."""
    value: object
    """What was there. None: the field was absent."""
    allowed: str
    """What could stand there instead."""

    def __str__(self) -> str:
        # reprlib clips: a message finds the field by its path, and a long value would flood a log.
        shown = "nothing" if self.value is None else reprlib.repr(self.value)
        return f"{self.path}: got {shown}; allowed: {self.allowed}"


class PolicyError(ValueError):
    """A document is not a policy; ``problems`` holds all that is wrong with it, and the message lists them all."""

    def __init__(self, problems: tuple[PolicyProblem, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(["this checkpoint policy cannot be used:", *(f"  {each}" for each in problems)]))


class Broken(NamedTuple):
    """A rule between the fields ``about`` that the field ``name`` breaks; one of these refused, it says nothing new."""

    about: tuple[str, ...]
    name: str
    value: object
    allowed: str


class Section:
    """An object in the document. Fields are read by annotation; a whole number is at least 1 if metadata is silent."""

    __slots__ = ()

    def broken(self, embedded: bool) -> Iterator[Broken]:
        yield from ()


class Reading:
    """One document that is being read: the sections that it becomes, and all that is wrong with it."""

    def __init__(self, embedded: bool) -> None:
        self.embedded = embedded
        self.problems: list[PolicyProblem] = []

    def refuse(self, path: str, value: object, allowed: str) -> None:
        self.problems.append(PolicyProblem(path=path or "document", value=value, allowed=allowed))

    def section(self, kind: type[Section], path: str, value: object) -> Section | None:
        """An object of the document as a section. What was refused has its default, or None, in it."""
        names = field_names(kind)
        if not isinstance(value, Mapping):
            self.refuse(path, value, "an object with the fields " + ", ".join(names))
            return None
        at = f"{path}." if path else ""
        given, doubtful = dict[str, object](), set[str]()
        for key, each in value.items():
            if key not in names and len(self.problems) < PROBLEMS_MOST:
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
                self.section(type(spec.default), f"{at}{name}", {})  # For its rules: some do not hold for nothing.
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
        """A value of the document as the field's annotation wants it; after a refusal the answer means nothing."""
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
            try:
                if amount := rule["unit"].parse(value):
                    return amount
            except ValueError:
                pass  # A reason in words is in the unit, for this and for zero.
            self.refuse(path, value, rule["unit"].allowed)
        elif kind is str:
            if not isinstance(value, str) or rule["pattern"].fullmatch(value) is None:
                self.refuse(path, value, rule["allowed"])
        elif kind is bool:
            if not isinstance(value, bool):
                self.refuse(path, value, "true or false")
        elif kind is int:
            least, most = rule.get("least", 1), rule.get("most", INT64_MAX)
            # A bool is an int to Python and none to the API server.
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                span = f"of at least {least}" if most == INT64_MAX else f"from {least} to {most}"
                self.refuse(path, value, f"a whole number {span}")
        elif isinstance(value, Mapping):
            return self.json(path, value)
        else:
            self.refuse(path, value, "an object of named values")
        return value

    def sections(self, kind: type[Section], path: str, value: object, most: int) -> object:
        """A list of objects, all of one kind."""
        if not isinstance(value, list | tuple) or len(value) > most:
            self.refuse(path, value, f"a list of at most {most} objects")
            return ()
        return tuple(self.section(kind, f"{path}[{index}]", each) for index, each in enumerate(value))

    def json(self, path: str, value: object, depth: int = 0) -> object:
        """A deep copy of a JSON value: no later change of the document reaches a frozen policy."""
        if depth > _DEPTH_MOST:
            self.refuse(path, None, f"at most {_DEPTH_MOST} objects and lists within each other")
            return None
        if isinstance(value, Mapping):
            for key in (each for each in value if not isinstance(each, str)):
                self.refuse(path, key, "strings as keys")
            return {key: self.json(f"{path}.{key}", each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.json(f"{path}[{index}]", each, depth + 1) for index, each in enumerate(value)]
        if isinstance(value, NoneType | str | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if len(self.problems) < PROBLEMS_MOST:
            self.refuse(path, value, "a JSON value: null, true, false, a finite number, a string, a list, an object")
        return None


def plain(value: object) -> object:
    """
    A section as JSON values that share nothing with it, None left out, and a default that is `unsaid`: sidecars and clients of before know
    nothing of the field, and refuse a document that has it.
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
    """The fields of a section by their names in the document: camelCase, or what metadata says."""
    fields = dataclasses.fields(cast("Any", kind))
    return {each.metadata.get("name", re.sub("_(.)", lambda it: it[1].upper(), each.name)): each for each in fields}


def nearest(name: object, allowed: Collection[str]) -> tuple[str, str | None]:
    """What to say about an unknown field, and the known one that was probably meant."""
    folded = {each.lower(): each for each in allowed}
    # Folding makes `period_steps` and `PeriodSteps` the same as `periodSteps`; what remains is a typo.
    near = difflib.get_close_matches(re.sub("[_-]", "", str(name)).lower(), folded, n=1)
    meant = folded[near[0]] if near else None
    return (f"did you mean {meant}? " if meant else "") + "the fields " + ", ".join(allowed), meant
