"""
Reads a document into the sections of a policy, writes sections back, and describes the problems of an invalid document.

Called from: `policy`, which has the fields. A section is a frozen dataclass. A field's annotation and metadata define its allowed values.
Breaking changes: refusing a document that was accepted before. `policy` has the rest of the contract.

Must never: stop at the first problem, or compute or print more than the size of the document justifies.
"""

import dataclasses
import difflib
import functools
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


_NEAR: Final = 0.6
"""How similar, as a ratio of `difflib`, a name is to the one of its section that was meant."""
_VERY_NEAR: Final = 0.85
"""The same for a name anywhere in the document. There are many, and some resemble others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyProblem:
    """One thing in a policy document that is not allowed."""

    path: str
    """The field, dotted, as the document spells it; ``spec.`` in front when the document is a whole object."""
    value: object
    """The value in the document. None: the field was absent."""
    allowed: str
    """Description of the allowed values; of the allowed fields, for an unknown one."""
    unknown: bool = False
    """Whether no field has this name at this place."""
    meant: str | None = None
    """The field that was probably meant instead of an unknown one, dotted from the beginning of the document. None: no field is near."""

    def __str__(self) -> str:
        # reprlib shortens the value, which could flood a log. The path identifies the field.
        shown = "nothing" if self.value is None else reprlib.repr(_without_credentials(self.value))
        guess = f" (did you mean {self.meant}?)" if self.meant else ""
        unknown = f"unknown field{guess}; " if self.unknown else ""
        return f"{self.path}: got {shown}; {unknown}allowed: {self.allowed}"


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

    def __init__(self, embedded: bool, kind: type[Section], at: str = "") -> None:
        """
        Args:
            embedded: whether the document is that of a run without a cluster.
            kind: the section that the document as a whole describes.
            at: where that section stands in the document. Empty: it is the document.
        """
        self.embedded = embedded
        self.problems: list[PolicyProblem] = []
        self._kind, self._at = kind, at
        self._values = 0
        """Number of values of the arguments that are being read."""

    def refuse(self, path: str, value: object, allowed: str) -> None:
        self.problems.append(PolicyProblem(path=path or "document", value=value, allowed=allowed))

    @functools.cached_property
    def _everywhere(self) -> Mapping[str, str]:
        """Where each name stands in the document."""
        return {name: _dotted(self._at, place) for name, place in places(self._kind).items()}

    def refuse_unknown(self, at: str, key: object, value: object, allowed: Collection[str]) -> str | None:
        """
        Refuse a field that its section does not have.

        Args:
            at: where the section stands. Empty: the beginning of the document.
            key, value: the field.
            allowed: the section's fields.

        Returns:
            The field that was probably meant, dotted from the beginning of the document. None: no field is near.
        """
        here = {name: _dotted(at, name) for name in allowed}
        meant = nearest(key, here, self._everywhere)
        self.problems.append(
            PolicyProblem(
                path=_dotted(at, str(key)),
                value=value,
                allowed="the fields " + ", ".join(allowed),
                unknown=True,
                meant=meant,
            )
        )
        return meant

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
                meant = self.refuse_unknown(path, key, each, names)
                # Not only a field of this section: `periodSteps` beside `trigger` was meant for `trigger`.
                if meant is not None and meant.startswith(at):
                    doubtful.add(names[meant.removeprefix(at).partition(".")[0]].name)
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


def places(kind: type[Section]) -> Mapping[str, str]:
    """
    Return where each name stands in a section and the sections below it: name -> dotted path. A name of several places has the highest
    one. Fields of objects in a list are left out: their place has a number that nobody knows.
    """
    found, level = dict[str, str](), [("", kind)]
    while level:
        below = []
        for at, section in level:
            hints = get_type_hints(section)
            for name, spec in field_names(section).items():
                found.setdefault(name, _dotted(at, name))
                for each in (hints[spec.name], *get_args(hints[spec.name])):
                    if (
                        isinstance(each, type)
                        and issubclass(each, Section)
                        and get_origin(hints[spec.name]) is not tuple
                    ):
                        below.append((_dotted(at, name), each))
        level = below
    return found


def nearest(name: object, here: Mapping[str, str], elsewhere: Mapping[str, str]) -> str | None:
    """
    Return the place of the field that was probably meant by a name, of those in its section and those anywhere. None: no field is near.

    Args:
        name: as the document spells it.
        here: the fields of its section, name -> place.
        elsewhere: all fields, name -> place.
    """
    # Folding equates `period_steps` and `PeriodSteps` with `periodSteps`. Any other difference is a typo.
    wanted = re.sub("[_-]", "", str(name)).lower()
    own, every = ({each.lower(): place for each, place in fields.items()} for fields in (here, elsewhere))
    if wanted in own or wanted in every:
        return own.get(wanted, every.get(wanted))
    for folded, cutoff in ((own, _NEAR), (every, _VERY_NEAR)):
        near = difflib.get_close_matches(wanted, folded, n=1, cutoff=cutoff)
        if near:
            return folded[near[0]]
    return None


def _dotted(at: str, name: str) -> str:
    return f"{at}.{name}" if at else name
