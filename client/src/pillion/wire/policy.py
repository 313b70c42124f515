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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, cast

from pillion.wire import names
from pillion.wire.object_store import AWS_CREDENTIALS
from pillion.wire.object_store import CaBundle as CaBundle
from pillion.wire.object_store import Checksum as Checksum
from pillion.wire.object_store import Credentials as Credentials
from pillion.wire.object_store import Encryption as Encryption
from pillion.wire.object_store import ObjectStore as ObjectStore
from pillion.wire.policy_document import MAX_PROBLEMS, Broken, Reading, Section, plain, text_rule
from pillion.wire.policy_document import PolicyError as PolicyError
from pillion.wire.policy_document import PolicyProblem as PolicyProblem
from pillion.wire.quantities import BYTES, CPU
from pillion.wire.quantities import duration_seconds as duration_seconds
from pillion.wire.quantities import format_bytes as format_bytes
from pillion.wire.quantities import quantity_bytes as quantity_bytes
from pillion.wire.retention import KEEP_ALL
from pillion.wire.retention import Best as Best
from pillion.wire.retention import KeepBest as KeepBest
from pillion.wire.retention import Retention as Retention

API_VERSION: Final = "pillion.dev/v1alpha1"
KIND: Final = "CheckpointPolicy"
_ENVELOPE: Final = ("apiVersion", "kind", "metadata", "spec", "status")


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
class Auto(Section):
    """Saves at a period that the sidecar chooses from what it measures: `pillion_sidecar.interval`."""

    overhead_percent: int = field(default=1, metadata={"most": 50})
    """Maximum share of the training time that saves may hold up, in percent. A period that is too short for it is lengthened."""
    max_seconds: int = field(default=3600, metadata={"most": 604_800})
    """Maximum seconds between persisted saves, which bounds the work that a failure costs. An hour by default; a week is the most.
    It takes precedence over ``overhead_percent``; the time of a persist takes precedence over both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger(Section):
    """When a save is due. A cluster requires at least one period. Without a cluster the script may decide each save itself."""

    period_steps: int | None = None
    """Training steps between persisted saves. None: no period in steps."""
    period_seconds: int | None = None
    """Seconds from a persisted save until the next is due. None: no period in seconds."""
    auto: Auto | None = field(default=None, metadata={"unsaid": True})
    """The sidecar chooses the period, in place of both others. None: it does not."""
    snapshot_steps: int | None = None
    """Training steps between snapshots, which stay in memory. Less than ``period_steps``. None: no snapshots."""
    local_steps: int | None = field(default=None, metadata={"unsaid": True})
    """Training steps between saves to the nodes' disks, which need not go to storage. More than ``snapshot_steps``, less than
    ``period_steps``. None: only persisted saves go there, on their way to storage."""
    on_termination: OnTermination = OnTermination.SAVE
    """Save by default: otherwise the newest snapshot in memory is lost with the pod. The drain is bounded in any case."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        fixed = self.period_steps if self.period_steps is not None else self.period_seconds
        if not embedded and fixed is None and self.auto is None:
            about = ("period_steps", "period_seconds", "auto")
            yield Broken(about, "", None, "at least one of periodSteps, periodSeconds and auto")
        if self.auto is not None and fixed is not None:
            about, name = (
                ("period_steps", "period_seconds", "auto"),
                "periodSteps" if self.period_steps else "periodSeconds",
            )
            yield Broken(about, name, fixed, "nothing with auto, which chooses the period")
        if self.period_steps and self.snapshot_steps and self.snapshot_steps >= self.period_steps:
            allowed = f"less than periodSteps, which is {self.period_steps}: a persisted save is in memory as well"
            yield Broken(("period_steps", "snapshot_steps"), "snapshotSteps", self.snapshot_steps, allowed)
        if self.period_steps and self.local_steps and self.local_steps >= self.period_steps:
            allowed = (
                f"less than periodSteps, which is {self.period_steps}: a persisted save is on the local disk as well"
            )
            yield Broken(("period_steps", "local_steps"), "localSteps", self.local_steps, allowed)
        if self.snapshot_steps and self.local_steps and self.snapshot_steps >= self.local_steps:
            allowed = (
                f"less than localSteps, which is {self.local_steps}: a save on the local disk is in memory as well"
            )
            yield Broken(("snapshot_steps", "local_steps"), "snapshotSteps", self.snapshot_steps, allowed)


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

    claim_name: str = field(metadata=text_rule("the name of a claim", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"))
    """The claim, in the namespace of the pod."""
    sub_path: str | None = field(
        default=None,
        metadata=text_rule("a relative directory without '..'", r"(?!/)(?!(.*/)?\.\.(/|$))[^\0\n]{1,4096}"),
    )
    """Directory in the volume. None: its root. Kubernetes refuses a bad one too, but only when the container starts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyDir(Section):
    """A directory that Kubernetes makes on the node for the pod, and that ends with the pod."""

    size_limit_bytes: int | None = field(default=None, metadata={"name": "sizeLimit", "unit": BYTES})
    """Bytes above which the kubelet evicts the pod. Three saves of all ranks of a pod, at least. None: what the node allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPath(Section):
    """A directory of the node, which outlives the pod."""

    path: str = field(metadata=text_rule("an absolute directory without '..'", r"/(?!(.*/)?\.\.(/|$))[^\0\n]{1,4095}"))
    """It must exist on each node, and the sidecar's user must be able to write there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local(Section):
    """
    A disk of the node, where saves are before they are on storage: exactly one of the three. A cluster takes ``emptyDir`` or ``hostPath``, a run
    without one ``path``.
    """

    path: str | None = field(default=None, metadata=text_rule("a directory", r"(?!\w+://)(?=[^\0\n]*[^\0\s])[^\0\n]*"))
    """Directory of a run without a cluster. None: the volume that injection mounts."""
    empty_dir: EmptyDir | None = None
    """Copies serve a crash of the trainer or of the sidecar."""
    host_path: HostPath | None = None
    """Copies also serve a new pod on the same node."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        given = [name for name in ("path", "empty_dir", "host_path") if getattr(self, name) is not None]
        about = ("path", "empty_dir", "host_path")
        if len(given) != 1:
            yield Broken(about, "", None, "exactly one of emptyDir and hostPath; without a cluster path")
        elif not embedded and self.path is not None:
            yield Broken(about, "path", self.path, "emptyDir or hostPath in a cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer(Section):
    """A third-party DCP ``StorageWriter``. The executor makes it as ``Class(**arguments)``."""

    name: str = field(metadata=text_rule('"module:Class"', r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*"))
    """``module:Class``. Only the executor imports it, and reports if it does not exist."""
    arguments: Mapping[str, object] = field(default_factory=dict, hash=False)
    """Keyword arguments, JSON values. Never credentials: a policy is readable by all who may list policies."""


_BACKENDS: Final = ("path", "persistent_volume_claim", "object_store")
"""Fields of a storage that each hold a backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage(Section):
    """
    The storage of the checkpoints: one backend, and the writer.

    The backends are ``path``, ``persistent_volume_claim`` and ``object_store``, never two of them. A cluster requires a claim or an object
    store, because a path in a sidecar ends with its pod. A run without a cluster takes a path, an object store, or neither if the code gives
    the root. It also accepts a claim, so that one document serves both, but nothing mounts it: such a run needs the root as well.
    ``writer`` is not a backend. It replaces Pillion's writer on a claim or a path and has its own format, without manifest, parts and
    digests.
    """

    path: str | None = field(
        default=None,
        metadata=text_rule(
            "a directory (an object store: see storage.objectStore)", r"(?!\w+://)(?=[^\0\n]*[^\0\s])[^\0\n]*"
        ),
    )
    """Directory in the file system of the writing process. Nothing in it is expanded. None: the claim, or the root from code."""
    persistent_volume_claim: VolumeClaim | None = None
    """A volume as the backend. None: another one, or the root from code."""
    object_store: ObjectStore | None = None
    """A bucket as the backend. None: another one, or the root from code."""
    local: Local | None = field(default=None, metadata={"unsaid": True})
    """A disk of the node in front of the backend: a save is safe after the time of a local disk. None: saves go to the backend at once."""
    writer: Writer | None = None
    """The third-party writer. None, the default: Pillion's own writer, which writes stock DCP files."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        backends = {
            "path": self.path,
            "persistentVolumeClaim": self.persistent_volume_claim,
            "objectStore": self.object_store,
        }
        given, about = [each for each, value in backends.items() if value is not None], _BACKENDS
        if len(given) > 1:
            yield Broken(about, "", tuple(given), "exactly one of " + ", ".join(backends))
        elif not embedded and self.path is not None:
            yield Broken(
                about, "path", self.path, "persistentVolumeClaim or objectStore in a cluster: a path ends with its pod"
            )
        elif not embedded and not given:
            allowed = "persistentVolumeClaim: {claimName: ...}, or objectStore: {url: ...}"
            yield Broken(about, "", None, allowed)
        if self.object_store is not None and self.writer is not None:
            allowed = "nothing with objectStore: a writer takes the place of Pillion's own, which alone writes to an object store"
            yield Broken(("object_store", "writer"), "writer", self.writer.name, allowed)
        if self.local is not None and self.writer is not None:
            allowed = "nothing with local: a writer takes the place of Pillion's own, which alone writes local copies"
            yield Broken(("local", "writer"), "writer", self.writer.name, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreFrom(Section):
    """Another job, from whose checkpoint a job begins that has none of its own."""

    job: str = field(
        metadata=text_rule("the id of a job of the namespace", r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,251}[A-Za-z0-9])?")
    )
    """Its id. Its directory lies beside this job's own, in the same storage and the same namespace."""
    step: int | None = field(default=None, metadata={"least": 0})
    """A committed step. None: its newest checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Restore(Section):
    """Which checkpoint a load takes."""

    mode: RestoreMode = RestoreMode.LATEST
    """Latest by default: a restarted trainer continues where the last one ended."""
    step: int | None = field(default=None, metadata={"least": 0})
    """The step to load with mode ``Step``; None with any other mode."""
    on_missing: OnMissing = OnMissing.FRESH
    """Fresh by default: the first run of a job has nothing to load."""
    source: RestoreFrom | None = field(default=None, metadata={"name": "from"})
    """Where a job begins that has no checkpoint of its own; ``from`` in the document. None: as ``on_missing`` says. A missing one is an error."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if self.source is not None and self.mode is not RestoreMode.LATEST:
            allowed = "nothing with from, which is for mode: Latest: it takes the job's own newest checkpoint first"
            yield Broken(("mode", "source"), "mode", self.mode.value, allowed)
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


_OBJECT_NAME: Final = text_rule("the name of an object of the namespace", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_MAX_ENTRIES: Final = 64
"""Maximum variables, and maximum sources of variables, of a sidecar. Each pod contains the policy with all of them."""
_MAX_USER_ID: Final = 2**31 - 1
"""Largest id of a user or group that Kubernetes accepts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretKey(Section):
    """One key of a Secret."""

    name: str = field(metadata=_OBJECT_NAME)
    """The Secret, in the namespace of the pod."""
    key: str = field(metadata=text_rule("a key of a Secret", r"[-._a-zA-Z0-9]{1,253}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvSource(Section):
    """Where the value of a variable comes from."""

    secret_key_ref: SecretKey
    """Read by the kubelet: the value is in no object that the operator sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvVar(Section):
    """A variable of the sidecar, as a pod has it."""

    name: str = field(metadata=text_rule("the name of a variable", r"[-._a-zA-Z][-._a-zA-Z0-9]{0,252}"))
    value: str | None = field(default=None, metadata=text_rule("a text without a zero byte", r"[^\0]*"))
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
    retention: Retention = KEEP_ALL
    restore: Restore = Restore()
    drain: Drain = Drain()
    failure_policy: FailurePolicy = FailurePolicy.FAIL
    """Fail by default: the pod's author learns of it at once, and not days later from a missing checkpoint."""
    suspend: bool = False
    """True: new pods are not injected, and running sidecars make no save of their own accord."""
    sidecar: Sidecar = Sidecar()

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if self.trigger.local_steps is not None and self.storage.local is None:
            allowed = "nothing without storage.local, which is the disk that such saves go to"
            yield Broken(("trigger", "storage"), "trigger.localSteps", self.trigger.local_steps, allowed)
        store = self.storage.object_store
        if store is not None and store.credentials is not None and store.credentials.aws_role_arn is not None:
            for index, variable in enumerate(self.sidecar.env):
                if variable.name in AWS_CREDENTIALS:
                    allowed = (
                        "a name that selects no credentials, as storage.objectStore.credentials.awsRoleArn selects them"
                    )
                    yield Broken(("storage", "sidecar"), f"sidecar.env[{index}].name", variable.name, allowed)


def parse(document: Mapping[str, object], *, embedded: bool) -> Policy:
    """
    Return the policy that a document describes.

    Of a whole object ``apiVersion`` and ``kind`` are checked; ``metadata`` and ``status`` are ignored. ``embedded`` is True for a run
    without a cluster. It may leave out the periods (the script then decides each save), ``storage`` (the code then gives the root) and
    ``staging.sizeLimit``.

    Raises:
        PolicyError: the document is not a valid policy. Has all problems.
    """
    spec = cast("object", document)
    is_whole = isinstance(spec, Mapping) and any(each in spec for each in _ENVELOPE)
    path, spec = ("spec", document.get("spec")) if is_whole else ("", spec)
    reading = Reading(embedded, Policy, path)
    if is_whole:
        for name, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
            if document.get(name) != wanted:
                reading.refuse(name, document.get(name), wanted)
        for key in [each for each in document if each not in _ENVELOPE][:MAX_PROBLEMS]:
            reading.refuse_unknown("", key, document[key], _ENVELOPE)
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
