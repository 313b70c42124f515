"""
The checkpoint policy: its fields, its defaults, and the rules between them.

Producer: the user, as a ``CheckpointPolicy`` object in a cluster or as YAML beside a run without one; and the operator, which sends the
current policy to each sidecar. Consumer: injector, sidecar and trainer, all through ``parse``.

Breaking changes: removing or renaming a field or an enum value; narrowing the allowed values; another default, or another meaning of an
absent field.
Non-breaking changes: a new optional field whose absence keeps the old behaviour; a new enum value; a wider range.

A document is the bare spec or a whole object. A null counts as an absent field, as for the API server.

Must never: read a clock, a file or the environment, or import anything outside the standard library. The module does not mount, create
or look up what a policy names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, cast

from pillion.wire import names
from pillion.wire.policy_document import MAX_PROBLEMS, Broken, Reading, Section, nearest, plain
from pillion.wire.policy_document import PolicyError as PolicyError
from pillion.wire.policy_document import PolicyProblem as PolicyProblem
from pillion.wire.quantities import BYTES, CPU
from pillion.wire.quantities import format_bytes as format_bytes
from pillion.wire.quantities import quantity_bytes as quantity_bytes

API_VERSION: Final = "pillion.dev/v1alpha1"
KIND: Final = "CheckpointPolicy"
_ENVELOPE: Final = ("apiVersion", "kind", "metadata", "spec", "status")


def _text(allowed: str, pattern: str) -> dict[str, object]:
    return {"allowed": allowed, "pattern": re.compile(pattern)}


# The enums: each name with its spelling in a document.
OnTermination = StrEnum("OnTermination", {"SAVE": "Save", "SKIP": "Skip"})
"""What happens to the newest staged save when the pod must end or the trainer has died."""
Overlap = StrEnum("Overlap", {"WAIT": "Wait", "SKIP": "Skip", "LATEST": "Latest"})
"""What a save without a free slot does: wait, drop itself, or replace the oldest sealed save that is not being written."""
MemoryAccounting = StrEnum("MemoryAccounting", {"SIDECAR": "Sidecar", "WORKLOAD": "Workload"})
"""Who pays for the arena: the sidecar (added to its request and limit), or the workload (nothing is added)."""
StoreMode = StrEnum("StoreMode", {"PREFIX": "Prefix", "OWN": "Own"})
"""Which store the pods use to plan and commit: a prefix in the job's own store, or a store that the coordinator hosts."""
RestoreMode = StrEnum("RestoreMode", {"LATEST": "Latest", "STEP": "Step", "NONE": "None"})
"""Which checkpoint a load takes: the newest readable one, one named step, or none."""
OnMissing = StrEnum("OnMissing", {"FRESH": "Fresh", "FAIL": "Fail"})
"""What a load does if there has never been a checkpoint. Unreadable checkpoints are an error in both cases."""
FailurePolicy = StrEnum("FailurePolicy", {"FAIL": "Fail", "IGNORE": "Ignore"})
"""What a failed injection does: keep the pod from starting, or let it start unchanged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger(Section):
    """When a save is due. A cluster requires at least one period. Without a cluster the script may decide each save itself."""

    period_steps: int | None = None
    """Training steps between persisted saves. None: no period in steps."""
    period_seconds: int | None = None
    """Seconds from a persisted save until the next is due. None: no period in seconds."""
    snapshot_steps: int | None = None
    """Training steps between snapshots, which stay in memory. Less than ``period_steps``. None: no snapshots."""
    on_termination: OnTermination = OnTermination.SAVE
    """Save by default: otherwise the newest snapshot in memory is lost with the pod. The drain is bounded in any case."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if not embedded and self.period_steps is None and self.period_seconds is None:
            yield Broken(("period_steps", "period_seconds"), "", None, "at least one of periodSteps and periodSeconds")
        if self.period_steps and self.snapshot_steps and self.snapshot_steps >= self.period_steps:
            allowed = f"less than periodSteps, which is {self.period_steps}: a persisted save is in memory as well"
            yield Broken(("period_steps", "snapshot_steps"), "snapshotSteps", self.snapshot_steps, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging(Section):
    """The arena: the shared memory that the trainer copies into."""

    size_limit_bytes: int | None = field(default=None, metadata={"name": "sizeLimit", "unit": BYTES})
    """Maximum bytes of a pod's arena, all ranks and slots together; ``sizeLimit``, a quantity, in the document. None: the size of its
    file system. Required in a cluster if the sidecar pays, as undeclared memory gets pods killed."""
    slots: int = field(default=2, metadata={"least": 2, "most": 16})
    """Number of saves that each local rank has room for. At least two: one stays complete while the next is staged."""
    overlap: Overlap = Overlap.WAIT
    """Wait by default: no requested save is lost, and the wait is bounded and counted."""
    memory_accounting: MemoryAccounting = MemoryAccounting.SIDECAR
    """Sidecar by default: the trainer's own memory limit stays as its author set it."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if not embedded and self.size_limit_bytes is None and self.memory_accounting is MemoryAccounting.SIDECAR:
            allowed = f"{BYTES.allowed}; may be left out with memoryAccounting: Workload"
            yield Broken(("size_limit_bytes", "memory_accounting"), "sizeLimit", None, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeClaim(Section):
    """A volume of the cluster, which the injector mounts into the sidecar."""

    claim_name: str = field(metadata=_text("the name of a claim", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"))
    """The claim, in the namespace of the pod."""
    sub_path: str | None = field(
        default=None, metadata=_text("a relative directory without '..'", r"(?!/)(?!(.*/)?\.\.(/|$))[^\0\n]{1,4096}")
    )
    """Directory in the volume. None: its root. Kubernetes refuses a bad one too, but only when the container starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer(Section):
    """A third-party DCP ``StorageWriter``. The executor makes it as ``Class(**arguments)``."""

    name: str = field(metadata=_text('"module:Class"', r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"))
    """``module:Class``. Only the executor imports it, and reports if it does not exist."""
    arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Keyword arguments, JSON values. Never credentials: a policy is readable by all who may list policies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage(Section):
    """
    The storage of the checkpoints: one backend, and the writer.

    The backends are ``path`` and ``persistent_volume_claim``, never both. A cluster requires a claim, because a path in a sidecar ends with
    its pod. A run without a cluster takes a path, or neither if the code gives the root. It also accepts a claim, so that one document
    serves both, but nothing mounts it: such a run needs the root as well. ``writer`` is not a backend. It replaces Pillion's writer and has
    its own format, without manifest, parts and digests.
    """

    path: str | None = field(
        default=None,
        metadata=_text("a directory (an object store: see storage.writer)", r"(?!\w+://)(?=[^\0\n]*[^\0\s])[^\0\n]*"),
    )
    """Directory in the file system of the writing process. Nothing in it is expanded. None: the claim, or the root from code."""
    persistent_volume_claim: VolumeClaim | None = None
    """The backend in a cluster. None: ``path``, or the root from code."""
    writer: Writer | None = None
    """The third-party writer. None, the default: Pillion's own writer, which writes stock DCP files."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        backends = ("path", "persistent_volume_claim")
        if self.path is not None and self.persistent_volume_claim is not None:
            yield Broken(backends, "", ("path", "persistentVolumeClaim"), "exactly one of the two")
        elif not embedded and self.path is not None:
            yield Broken(backends, "path", self.path, "persistentVolumeClaim in a cluster: a path ends with its pod")
        elif not embedded and self.persistent_volume_claim is None:
            yield Broken(backends, "persistentVolumeClaim", None, "a claim: {claimName: ..., subPath: ...}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention(Section):
    """Which checkpoints stay. Always kept: the newest one, the last one that a load verified, and one that a load of the job is reading."""

    keep_last: int | None = None
    """Number of newest checkpoints that stay. None, the default: all. Nothing is removed unless the policy requests it."""
    keep_every_steps: int | None = None
    """Checkpoints at multiples of this step stay forever, besides the last ones. None: no such step."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if self.keep_every_steps is not None and self.keep_last is None:
            allowed = "keepLast together with keepEverySteps: without keepLast every checkpoint stays"
            yield Broken(("keep_last", "keep_every_steps"), "keepLast", None, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore(Section):
    """Which checkpoint a load takes."""

    mode: RestoreMode = RestoreMode.LATEST
    """Latest by default: a restarted trainer continues where the last one ended."""
    step: int | None = field(default=None, metadata={"least": 0})
    """The step to load with mode ``Step``; None with any other mode."""
    on_missing: OnMissing = OnMissing.FRESH
    """Fresh by default: the first run of a job has nothing to load."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if (self.mode is RestoreMode.STEP) != (self.step is not None):
            allowed = "the step to load with mode: Step, nothing with any other mode"
            yield Broken(("mode", "step"), "step", self.step, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(Section):
    """The end of a pod."""

    timeout_seconds: int = field(default=300, metadata={"least": 1, "most": 86_400})
    """Seconds to finish what is staged, added to the pod's grace period. Five minutes leave room for a slow volume; a
    day is the most, as a node that drains waits for it."""
    end_trainer: bool = field(default=True, metadata={"unsaid": True})
    """Whether trainers without a SIGTERM handler of their own are ended once the last save is committed. Without it a process that
    ignores SIGTERM, as the first one of a container does, holds the pod for the whole of its grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceList(Section):
    """Amounts of what a node has; ``cpu`` and ``memory``, both quantities, in the document."""

    cpu_millicores: int | None = field(default=None, metadata={"name": "cpu", "unit": CPU})
    """Thousandths of a CPU. None: not set."""
    memory_bytes: int | None = field(default=None, metadata={"name": "memory", "unit": BYTES})
    """Bytes. None: not set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources(Section):
    """Requests and limits of the sidecar's container, without the arena, which the injector adds."""

    requests: ResourceList = ResourceList()
    """What is set aside. Empty: Kubernetes takes the limits."""
    limits: ResourceList = ResourceList()
    """The most it may take."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        for name, unit, wanted, most in (
            ("cpu", CPU, self.requests.cpu_millicores, self.limits.cpu_millicores),
            ("memory", BYTES, self.requests.memory_bytes, self.limits.memory_bytes),
        ):
            if wanted is not None and most is not None and wanted > most:
                allowed = f"at most limits.{name}, which is {unit.format(most)}"
                yield Broken(("requests", "limits"), f"requests.{name}", unit.format(wanted), allowed)


_OBJECT_NAME: Final = _text("the name of an object of the namespace", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_MAX_ENTRIES: Final = 64
"""Maximum variables, and maximum sources of variables, of a sidecar. Each pod contains the policy with all of them."""
_MAX_USER_ID: Final = 2**31 - 1
"""Largest id of a user or group that Kubernetes accepts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretKey(Section):
    """One key of a Secret."""

    name: str = field(metadata=_OBJECT_NAME)
    """The Secret, in the namespace of the pod."""
    key: str = field(metadata=_text("a key of a Secret", r"[-._a-zA-Z0-9]{1,253}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSource(Section):
    """Where the value of a variable comes from."""

    secret_key_ref: SecretKey
    """Read by the kubelet: the value is in no object that the operator sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvVar(Section):
    """A variable of the sidecar, as a pod has it."""

    name: str = field(metadata=_text("the name of a variable", r"[-._a-zA-Z][-._a-zA-Z0-9]{0,252}"))
    value: str | None = field(default=None, metadata=_text("a text without a zero byte", r"[^\0]*"))
    """The kubelet expands $(NAME) in it."""
    value_from: EnvSource | None = None

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if (self.value is None) == (self.value_from is None):
            yield Broken(("value", "value_from"), "", None, "exactly one of value and valueFrom")
        if self.name in names.SET_BY_INJECTION:
            yield Broken(("name",), "name", self.name, "a name that injection does not set itself")


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretName(Section):
    """A Secret."""

    name: str = field(metadata=_OBJECT_NAME)
    """In the namespace of the pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvFrom(Section):
    """Variables of the sidecar, one for each key of a Secret."""

    secret_ref: SecretName


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar(Section):
    """The sidecar's container. A run without a cluster has none of it."""

    resources: Resources = Resources(
        requests=ResourceList(cpu_millicores=500, memory_bytes=2**30), limits=ResourceList(memory_bytes=2**30)
    )
    """The default has no CPU limit: throttling would slow the drain. Given resources replace the default as a whole."""
    run_as_user: int | None = field(default=None, metadata={"least": 0, "most": _MAX_USER_ID})
    """User id of the sidecar; 0 for a volume that only root may write. None: the trainer's, if the pod sets it, else the operator's setting."""
    run_as_group: int | None = field(default=None, metadata={"least": 0, "most": _MAX_USER_ID})
    """Group id of the sidecar. None: as for the user."""
    env: tuple[EnvVar, ...] = field(default=(), metadata={"most": _MAX_ENTRIES, "unsaid": True})
    """Variables: settings of the sidecar, or of a `storage.writer`. A pod's own value of a variable takes precedence."""
    env_from: tuple[EnvFrom, ...] = field(default=(), metadata={"most": _MAX_ENTRIES, "unsaid": True})
    """Secrets whose keys are variables: credentials of a `storage.writer`, in the sidecar and nowhere else."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        seen = set[str]()
        for index, variable in enumerate(self.env):
            if variable.name in seen:
                yield Broken(("env",), f"env[{index}].name", variable.name, "each name once")
            seen.add(variable.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(Section):
    """A checkpoint policy. ``parse`` returns a valid one. ``parse(dump(policy))`` checks one made by hand."""

    trigger: Trigger = Trigger()
    staging: Staging = Staging()
    store: StoreMode = StoreMode.PREFIX
    """Prefix by default: it opens no port and starts nothing."""
    storage: Storage = Storage()
    retention: Retention = Retention()
    restore: Restore = Restore()
    drain: Drain = Drain()
    failure_policy: FailurePolicy = FailurePolicy.FAIL
    """Fail by default: the pod's author learns of it at once, and not days later from a missing checkpoint."""
    suspend: bool = False
    """True: new pods are not injected, and running sidecars make no save of their own accord."""
    sidecar: Sidecar = Sidecar()


def parse(document: Mapping[str, object], *, embedded: bool) -> Policy:
    """
    Return the policy that a document describes.

    Of a whole object ``apiVersion`` and ``kind`` are checked; ``metadata`` and ``status`` are ignored. ``embedded`` is True for a run
    without a cluster. It may leave out the periods (the script then decides each save), ``storage`` (the code then gives the root) and
    ``staging.sizeLimit``.

    Raises:
        PolicyError: the document is not a valid policy. Has all problems.
    """
    reading = Reading(embedded)
    path, spec = "", cast("object", document)
    if isinstance(spec, Mapping) and any(each in spec for each in _ENVELOPE):
        path, spec = "spec", spec.get("spec")
        for name, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
            if document.get(name) != wanted:
                reading.refuse(name, document.get(name), wanted)
        for key in [each for each in document if each not in _ENVELOPE][:MAX_PROBLEMS]:
            reading.refuse(str(key), document[key], nearest(key, _ENVELOPE)[0])
    policy = reading.section(Policy, path, spec)
    if reading.problems:
        raise PolicyError(tuple(reading.problems))
    return cast("Policy", policy)


def dump(policy: Policy) -> dict[str, object]:
    """
    The canonical document of a policy: the spec in camelCase, JSON values that share nothing with it, None left out.

    Defaults are written out, so that a reader of another release with other defaults reads the same policy. Defaults of newer fields are
    left out, because an older reader refuses unknown fields.
    """
    return cast("dict[str, object]", plain(policy))


def dump_section(section: Section) -> dict[str, object]:
    """One section of a policy, as it stands in its document."""
    return cast("dict[str, object]", plain(section))
