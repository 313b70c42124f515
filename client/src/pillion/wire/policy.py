"""
The whole of the checkpoint policy: its fields, its defaults, how a document becomes one and how it is written back.

Producer: the user, as a ``CheckpointPolicy`` object in a cluster or as YAML next to a run without one; the operator,
which hands the policy as it is now to each sidecar. Consumer: injector, sidecar and trainer, all through ``parse``.

Breaking changes: removing or renaming a field or an enum value; narrowing what a field allows; another default or
another meaning of an absent field.
Non-breaking changes: a new optional field whose absence means what was done before; a new enum value; a wider range.

A document is the bare spec or a whole object. A null is an absent field, as it is for the API server.

This module must never read a clock, a file or the environment, nor import anything outside the standard library. It
does not mount, create or look up what a policy names.
"""

import dataclasses
import difflib
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from types import NoneType
from typing import Any, Final, NamedTuple, cast, get_args, get_type_hints

API_VERSION: Final = "pillion.dev/v1alpha1"
KIND: Final = "CheckpointPolicy"
_ENVELOPE: Final = ("apiVersion", "kind", "metadata", "spec", "status")
_DEPTH_MOST: Final = 32
"""Objects and lists within each other in a writer's arguments: reader and writer go down all of them."""
_TOLD_MOST: Final = 100
"""Problems after which unknown fields, and arguments, are not looked at any more: a document may have a hundred thousand."""
_INT64_MAX: Final = 2**63 - 1
"""The largest integer that the API server stores; a larger one would not survive the trip through a cluster."""


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


_BINARY: Final = {"Ei": 2**60, "Pi": 2**50, "Ti": 2**40, "Gi": 2**30, "Mi": 2**20, "Ki": 2**10}
_DECIMAL: Final = {"E": 10**18, "P": 10**15, "T": 10**12, "G": 10**9, "M": 10**6, "k": 10**3}
_FACTORS: Final = {suffix: Fraction(factor) for suffix, factor in (_BINARY | _DECIMAL).items()} | {
    suffix: Fraction(1, 1000**power) for power, suffix in enumerate(("", "m", "u", "n"))
}
# Lengths are bounded so that no document makes us compute a number of a billion digits.
_QUANTITY: Final = re.compile(
    r"\+?([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE]([+-]?[0-9]{1,2})|([KMGTPE]i|[kMGTPEmun]))?"
)


def _quantity(value: object, parts: int) -> int:
    """How many of ``parts`` per unit a Kubernetes quantity is, exactly; ValueError when that is no whole int64 >= 0."""
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if match := _QUANTITY.fullmatch(text):
        number, exponent, suffix = match.groups()
        exact = Fraction(number.rstrip(".")) * Fraction(10) ** int(exponent or 0) * _FACTORS[suffix or ""] * parts
        if exact.denominator == 1 and exact <= _INT64_MAX:
            return exact.numerator
    raise ValueError(f"{value!r} is no quantity of a whole number of bytes, or of thousandths of a CPU")


def quantity_bytes(quantity: str | int) -> int:
    """
    Bytes of a Kubernetes quantity such as ``"96Gi"``, ``"1.5G"``, ``"1e9"`` or ``1073741824``, exactly.

    Raises:
        ValueError: not a quantity, negative, above 2**63 - 1, or with a fraction of a byte.
    Source: Kubernetes API reference, "Quantity".
    """
    return _quantity(quantity, 1)


def format_bytes(num_bytes: int) -> str:
    """The quantity of exactly this many bytes: the largest binary suffix that divides it, else decimal, else none."""
    whole = (f"{num_bytes // size}{name}" for name, size in (_BINARY | _DECIMAL).items() if num_bytes % size == 0)
    return next(whole, str(num_bytes)) if num_bytes else "0"


class _Unit(NamedTuple):
    parse: Callable[[Any], int]
    format: Callable[[int], str]
    allowed: str


_BYTES: Final = _Unit(quantity_bytes, format_bytes, 'a positive number of bytes, such as "96Gi", "1.5G" or 1073741824')
_CPU: Final = _Unit(
    parse=lambda quantity: _quantity(quantity, 1000),
    format=lambda millicores: f"{millicores}m" if millicores % 1000 else str(millicores // 1000),
    allowed='a positive number of CPUs, in steps of a thousandth, such as "500m", "0.5" or 2',
)


def _text(allowed: str, pattern: str) -> dict[str, object]:
    return {"allowed": allowed, "pattern": re.compile(pattern)}


# The closed sets, each name with its spelling in a document.
OnTermination = StrEnum("OnTermination", {"SAVE": "Save", "SKIP": "Skip"})
"""What happens to the newest staged save when the pod is told to end or the trainer is gone."""
Overlap = StrEnum("Overlap", {"WAIT": "Wait", "SKIP": "Skip", "LATEST": "Latest"})
"""What a save that finds no free slot does: wait, nothing, or replace the oldest sealed one not being written."""
MemoryAccounting = StrEnum("MemoryAccounting", {"SIDECAR": "Sidecar", "WORKLOAD": "Workload"})
"""Who pays for the arena: the sidecar (added to its request and limit), or the workload (nothing is added)."""
StoreMode = StrEnum("StoreMode", {"PREFIX": "Prefix", "OWN": "Own"})
"""Where pods meet to plan and commit: a prefix in the job's own store, or a store that the coordinator hosts."""
RestoreMode = StrEnum("RestoreMode", {"LATEST": "Latest", "STEP": "Step", "NONE": "None"})
"""Which checkpoint a load takes: the newest that can be read, one named step, or none."""
OnMissing = StrEnum("OnMissing", {"FRESH": "Fresh", "FAIL": "Fail"})
"""What a load does where no checkpoint ever was. Checkpoints that cannot be read are an error in both cases."""
FailurePolicy = StrEnum("FailurePolicy", {"FAIL": "Fail", "IGNORE": "Ignore"})
"""What an injection that cannot be done does to the pod: keeps it from starting, or lets it start untouched."""


class _Broken(NamedTuple):
    """A rule between the fields ``about`` that the field ``name`` breaks; one of these refused, it says nothing new."""

    about: tuple[str, ...]
    name: str
    value: object
    allowed: str


class _Section:
    """An object in the document. Fields are read by annotation; a whole number is at least 1 if metadata is silent."""

    __slots__ = ()

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        yield from ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger(_Section):
    """When a save is due. In a cluster at least one period is set; without one each save may be the user's own."""

    period_steps: int | None = None
    """Training steps between persisted saves. None: steps alone make no save due."""
    period_seconds: int | None = None
    """Seconds since the last persisted save after which the next is due. None: time alone makes no save due."""
    snapshot_steps: int | None = None
    """Training steps between snapshots, which stay in memory; less than ``period_steps``. None: no such snapshots."""
    on_termination: OnTermination = OnTermination.SAVE
    """Save by default: what is in memory when the pod ends is otherwise lost, and the drain is bounded anyway."""

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        if not embedded and self.period_steps is None and self.period_seconds is None:
            yield _Broken(("period_steps", "period_seconds"), "", None, "at least one of periodSteps and periodSeconds")
        if self.period_steps and self.snapshot_steps and self.snapshot_steps >= self.period_steps:
            allowed = f"less than periodSteps, which is {self.period_steps}: a persisted save is in memory as well"
            yield _Broken(("period_steps", "snapshot_steps"), "snapshotSteps", self.snapshot_steps, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging(_Section):
    """The arena: the shared memory that the trainer copies into."""

    size_limit_bytes: int | None = field(default=None, metadata={"name": "sizeLimit", "unit": _BYTES})
    """Most bytes that a pod's arena takes, all ranks and slots together; ``sizeLimit``, a quantity, in the document.
    None: what its file system has; not in a cluster where the sidecar pays, as undeclared memory gets pods killed."""
    slots: int = field(default=2, metadata={"least": 2, "most": 16})
    """Saves that each local rank has room for. Two, and never less: one stays whole while the next is staged."""
    overlap: Overlap = Overlap.WAIT
    """Wait by default: no save that was asked for is lost, and the wait is bounded and counted."""
    memory_accounting: MemoryAccounting = MemoryAccounting.SIDECAR
    """Sidecar by default: the trainer's own memory limit stays what its author measured."""

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        if not embedded and self.size_limit_bytes is None and self.memory_accounting is MemoryAccounting.SIDECAR:
            allowed = f"{_BYTES.allowed}; may be left out with memoryAccounting: Workload"
            yield _Broken(("size_limit_bytes", "memory_accounting"), "sizeLimit", None, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeClaim(_Section):
    """A volume of the cluster, which the injector mounts into the sidecar."""

    claim_name: str = field(metadata=_text("the name of a claim", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"))
    """The claim, in the namespace of the pod."""
    sub_path: str | None = field(
        default=None, metadata=_text("a relative directory without '..'", r"(?!/)(?!(.*/)?\.\.(/|$))[^\0\n]{1,4096}")
    )
    """Directory in the volume. None: its root. Kubernetes refuses a bad one too, but only when the container starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer(_Section):
    """A DCP ``StorageWriter`` of someone else's, made by the executor as ``Class(**arguments)``."""

    name: str = field(metadata=_text('"module:Class"', r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"))
    """``module:Class``. Imported in the executor only; whether it exists is found out there."""
    arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Keyword arguments, JSON values. Never credentials: a policy is readable by all who may list policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage(_Section):
    """
    Where checkpoints rest: one backend, and who writes into it.

    The backends are ``path`` and ``persistent_volume_claim``, never both. A cluster takes a claim: a path of a sidecar
    ends with its pod. A run without a cluster takes a path, or neither and the root given in code; a claim is accepted,
    so that one document serves both, but nothing mounts it: such a run needs the root as well. ``writer`` is no
    backend: it replaces who writes, and what it leaves is its own format: no manifest, no parts, no digests of ours.
    """

    path: str | None = field(
        default=None,
        metadata=_text("a directory (an object store: see storage.writer)", r"(?!\w+://)(?=[^\0\n]*[^\0\s])[^\0\n]*"),
    )
    """Directory, as the writing process sees it; nothing in it is expanded. None: the claim, or the root from code."""
    persistent_volume_claim: VolumeClaim | None = None
    """The backend in a cluster. None: ``path``, or the root from code."""
    writer: Writer | None = None
    """None, the default: Pillion's own writer, which makes stock DCP files."""

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        backends = ("path", "persistent_volume_claim")
        if self.path is not None and self.persistent_volume_claim is not None:
            yield _Broken(backends, "", ("path", "persistentVolumeClaim"), "exactly one of the two")
        elif not embedded and self.path is not None:
            yield _Broken(backends, "path", self.path, "persistentVolumeClaim in a cluster: a path ends with its pod")
        elif not embedded and self.persistent_volume_claim is None:
            yield _Broken(backends, "persistentVolumeClaim", None, "a claim: {claimName: ..., subPath: ...}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention(_Section):
    """Which checkpoints stay. The newest one, the last one that a load has verified, and one that a load of the job is reading always do."""

    keep_last: int | None = None
    """How many of the newest stay. None, the default: all; nothing is removed that no one asked to remove."""
    keep_every_steps: int | None = None
    """Checkpoints at a multiple of this step stay for good, besides the last ones. None: there is no such step."""

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        if self.keep_every_steps is not None and self.keep_last is None:
            allowed = "keepLast together with keepEverySteps: without keepLast every checkpoint stays"
            yield _Broken(("keep_last", "keep_every_steps"), "keepLast", None, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore(_Section):
    """What a load takes."""

    mode: RestoreMode = RestoreMode.LATEST
    """Latest by default: a restarted trainer goes on where the last one ended."""
    step: int | None = field(default=None, metadata={"least": 0})
    """The step to load with mode ``Step``; None with any other mode."""
    on_missing: OnMissing = OnMissing.FRESH
    """Fresh by default: the first run of a job has nothing to load."""

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        if (self.mode is RestoreMode.STEP) != (self.step is not None):
            allowed = "the step to load with mode: Step, nothing with any other mode"
            yield _Broken(("mode", "step"), "step", self.step, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(_Section):
    """The end of a pod."""

    timeout_seconds: int = field(default=300, metadata={"least": 1, "most": 86_400})
    """Seconds to finish what is staged, added to the pod's grace period. Five minutes leave room for a slow volume; a
    day is the most, as a node that drains waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceList(_Section):
    """Amounts of what a node has; ``cpu`` and ``memory``, both quantities, in the document."""

    cpu_millicores: int | None = field(default=None, metadata={"name": "cpu", "unit": _CPU})
    """Thousandths of a CPU. None: not said."""
    memory_bytes: int | None = field(default=None, metadata={"name": "memory", "unit": _BYTES})
    """Bytes. None: not said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources(_Section):
    """Requests and limits of the sidecar's container, without the arena, which the injector adds."""

    requests: ResourceList = ResourceList()
    """What is set aside. Empty: Kubernetes takes the limits."""
    limits: ResourceList = ResourceList()
    """The most it may take."""

    def _broken(self, embedded: bool) -> Iterator[_Broken]:
        for name, unit, wanted, most in (
            ("cpu", _CPU, self.requests.cpu_millicores, self.limits.cpu_millicores),
            ("memory", _BYTES, self.requests.memory_bytes, self.limits.memory_bytes),
        ):
            if wanted is not None and most is not None and wanted > most:
                allowed = f"at most limits.{name}, which is {unit.format(most)}"
                yield _Broken(("requests", "limits"), f"requests.{name}", unit.format(wanted), allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar(_Section):
    """The sidecar's container."""

    resources: Resources = Resources(
        requests=ResourceList(cpu_millicores=500, memory_bytes=2**30), limits=ResourceList(memory_bytes=2**30)
    )
    """The default has no CPU limit: throttling would slow the drain. Given resources replace the default as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(_Section):
    """A checkpoint policy. ``parse`` makes one that holds; one made by hand is checked by ``parse(dump(policy))``."""

    trigger: Trigger = Trigger()
    staging: Staging = Staging()
    store: StoreMode = StoreMode.PREFIX
    """Prefix by default: it opens no port and starts nothing."""
    storage: Storage = Storage()
    retention: Retention = Retention()
    restore: Restore = Restore()
    drain: Drain = Drain()
    failure_policy: FailurePolicy = FailurePolicy.FAIL
    """Fail by default: who opted in learns at once, and not days later when there is no checkpoint to go back to."""
    suspend: bool = False
    """True: new pods are not injected, and running sidecars make no save of their own accord."""
    sidecar: Sidecar = Sidecar()


def parse(document: Mapping[str, object], *, embedded: bool) -> Policy:
    """
    The policy that a document describes, or PolicyError with all that is wrong with it.

    Of a whole object ``apiVersion`` and ``kind`` are checked; ``metadata`` and ``status`` are left alone. ``embedded``
    is True for a run without a cluster, which may leave out the periods (each save is then the user's own), ``storage``
    (the root is then given in code) and ``staging.sizeLimit``.
    """
    reading = _Reading(embedded)
    path, spec = "", cast("object", document)
    if isinstance(spec, Mapping) and any(each in spec for each in _ENVELOPE):
        path, spec = "spec", spec.get("spec")
        for name, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
            if document.get(name) != wanted:
                reading.refuse(name, document.get(name), wanted)
        for key in [each for each in document if each not in _ENVELOPE][:_TOLD_MOST]:
            reading.refuse(str(key), document[key], _nearest(key, _ENVELOPE)[0])
    policy = reading.section(Policy, path, spec)
    if reading.problems:
        raise PolicyError(tuple(reading.problems))
    return cast("Policy", policy)


def dump(policy: Policy) -> dict[str, object]:
    """
    The canonical document of a policy: the spec in camelCase, JSON values that share nothing with it, None left out.

    Defaults are written out: a reader of another release, whose defaults may be others, then reads the same policy.
    """
    return cast("dict[str, object]", _plain(policy))


class _Reading:
    def __init__(self, embedded: bool) -> None:
        self.embedded = embedded
        self.problems: list[PolicyProblem] = []

    def refuse(self, path: str, value: object, allowed: str) -> None:
        self.problems.append(PolicyProblem(path=path or "document", value=value, allowed=allowed))

    def section(self, kind: type[_Section], path: str, value: object) -> _Section | None:
        """An object of the document as a section. What was refused has its default, or None, in it."""
        names = _names(kind)
        if not isinstance(value, Mapping):
            self.refuse(path, value, "an object with the fields " + ", ".join(names))
            return None
        at = f"{path}." if path else ""
        given, doubtful = dict[str, object](), set[str]()
        for key, each in value.items():
            if key not in names and len(self.problems) < _TOLD_MOST:
                hint, meant = _nearest(key, names)
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
            if isinstance(spec.default, _Section) and not {spec.name} & (given.keys() | doubtful):
                self.section(type(spec.default), f"{at}{name}", {})  # For its rules: some do not hold for nothing.
            elif spec.default is spec.default_factory is dataclasses.MISSING and spec.name not in given:
                if spec.name not in doubtful:
                    self.refuse(f"{at}{name}", None, spec.metadata["allowed"])
                given[spec.name] = None
        section = kind(**given)
        for broken in section._broken(self.embedded):
            if doubtful.isdisjoint(broken.about):
                self.refuse(f"{at}{broken.name}".rstrip("."), broken.value, broken.allowed)
        return section

    def value(self, section: type[_Section], spec: dataclasses.Field[Any], path: str, value: object) -> object:
        """A value of the document as the field's annotation wants it; after a refusal the answer means nothing."""
        hint, rule = get_type_hints(section)[spec.name], spec.metadata
        kind = next((each for each in get_args(hint) if hint == each | None), hint)
        if isinstance(kind, type) and issubclass(kind, _Section):
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
            least, most = rule.get("least", 1), rule.get("most", _INT64_MAX)
            # A bool is an int to Python and none to the API server.
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                span = f"of at least {least}" if most == _INT64_MAX else f"from {least} to {most}"
                self.refuse(path, value, f"a whole number {span}")
        elif isinstance(value, Mapping):
            return self.json(path, value)
        else:
            self.refuse(path, value, "an object of named values")
        return value

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
        if len(self.problems) < _TOLD_MOST:
            self.refuse(path, value, "a JSON value: null, true, false, a finite number, a string, a list, an object")
        return None


def _plain(value: object) -> object:
    if isinstance(value, _Section):
        known = _names(type(value)).items()
        fields = ((name, spec.metadata.get("unit"), getattr(value, spec.name)) for name, spec in known)
        return {name: unit.format(each) if unit else _plain(each) for name, unit, each in fields if each is not None}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, StrEnum) else value


def _names(kind: type[_Section]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a section by their names in the document: camelCase, or what metadata says."""
    fields = dataclasses.fields(cast("Any", kind))
    return {each.metadata.get("name", re.sub("_(.)", lambda it: it[1].upper(), each.name)): each for each in fields}


def _nearest(name: object, known: Collection[str]) -> tuple[str, str | None]:
    """What to say about an unknown field, and the known one that was probably meant."""
    folded = {each.lower(): each for each in known}
    # Folding makes `period_steps` and `PeriodSteps` the same as `periodSteps`; what remains is a typo.
    near = difflib.get_close_matches(re.sub("[_-]", "", str(name)).lower(), folded, n=1)
    meant = folded[near[0]] if near else None
    return (f"did you mean {meant}? " if meant else "") + "the fields " + ", ".join(known), meant
