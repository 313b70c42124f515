"""
The whole of: the kept part of an injected pod, and finding the pod that sent a report.

Called from: the server, for each report; the controller, which counts pods and reads their annotations.
Must never: keep more of a pod than is here: there may be five thousand, and the API server sends each whole.
"""

import re
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pillion_operator.cluster import client, paths
from pillion_operator.home import times
from pillion_operator.home.refusal import Refused, Result
from pillion_operator.injection import annotations, pods, status

Json = dict[str, Any]

LABEL_SELECTOR: Final = f"{annotations.INJECTED}=true"
FIELD_SELECTOR: Final = "status.phase!=Succeeded,status.phase!=Failed"
"""
Selector without pods that have ended: they stay until their job is removed, and no longer count. A draining pod is still running
for the API server.
"""
MAX_REMEMBERED: Final = 1024
"""Maximum number of remembered answers about single pods. Only pods that are not in the cache are looked up."""
REMEMBERED_S: Final = 10.0
"""Time for which such an answer is valid: a refused pod reports again every few seconds."""
ASKED_PER_S: Final = 5.0
"""
Average lookups a second of pods that are not in the cache. Anybody can name such a pod; legitimate ones are new pods, and pods
that drain after an eviction.
"""
ASKED_BURST: Final = 50.0
"""Maximum number of such lookups at once: a drained node has as many pods."""
MAX_WARNINGS: Final = 8
"""Maximum number of warnings that are kept of a pod. Injection writes fewer, but everybody who creates a pod can write the annotation."""
MAX_WARNING: Final = 256
"""Maximum characters of each. Injection writes shorter ones."""
# What the API server takes as the name of a pod or a namespace; it becomes a part of a path.
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_NOTE_FIELD: Final = f"f:{annotations.SAVE_NOW}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The object that made a pod."""

    api_version: str
    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """An injected pod."""

    namespace: str
    name: str
    uid: str
    created: str
    policy: str
    job_id: str
    owner: Owner | None
    """None: it was made by hand."""
    save_now: str
    """The annotation's value; empty: it has none."""
    save_now_time: str
    """When the annotation was last set. Empty: it has none, or nobody knows."""
    warnings: tuple[str, ...] = ()
    """Warnings of its injection."""


def project(document: Json) -> Pod | None:
    """The kept part of a pod from the API server, with or without its spec. None: the pod is not injected."""
    if pods.metadata_map(document, "labels").get(annotations.INJECTED) != "true":
        return None
    injection = status.read(document)
    if injection is None:
        return None
    metadata = document["metadata"]
    value, set_at = save_now(document)
    # Many pods share these: one text for all of them.
    return Pod(
        namespace=sys.intern(str(metadata.get("namespace") or "")),
        name=str(metadata.get("name") or ""),
        uid=str(metadata.get("uid") or ""),
        created=sys.intern(str(metadata.get("creationTimestamp") or "")),
        policy=sys.intern(str(injection.policy)),
        job_id=sys.intern(str(injection.job_id)),
        owner=_owner(document),
        save_now=sys.intern(value),
        save_now_time=set_at,
        warnings=tuple(sys.intern(each[:MAX_WARNING]) for each in injection.warnings[:MAX_WARNINGS]),
    )


def save_now(document: Json) -> tuple[str, str]:
    """
    The annotation ``pillion.dev/save-now`` of an object and when it was set: a value that the object was made with is none,
    as a template repeats it with each pod.
    """
    value = pods.metadata_map(document, "annotations").get(annotations.SAVE_NOW, "")
    if not value:
        return "", ""
    metadata = document["metadata"]
    set_at = ""
    for entry in metadata.get("managedFields") or []:
        fields = entry.get("fieldsV1") or {}
        if _NOTE_FIELD in ((fields.get("f:metadata") or {}).get("f:annotations") or {}):
            set_at = max(set_at, times.canonical(str(entry.get("time") or "")))
    if set_at and set_at == times.canonical(str(metadata.get("creationTimestamp") or "")):
        return "", ""
    return value, set_at


def _owner(document: Json) -> Owner | None:
    controller = pods.controller(document)
    if controller is None:
        return None
    keys = ("apiVersion", "kind", "name", "uid")
    version, kind, name, uid = (sys.intern(str(controller.get(key) or "")) for key in keys)
    return Owner(api_version=version, kind=kind, name=name, uid=uid)


class Cache(Protocol):
    """The injected pods that run, as far as they are known: a Reflector."""

    def get(self, namespace: str, name: str) -> Pod | None: ...


class Api(Protocol):
    """The used part of `cluster.client.Client`."""

    async def get(self, path: str, *, metadata_only: bool = False) -> Json: ...


class Pods:
    """Injected pods by name and UID: from the cache, or from the API server where the cache is behind, or the pod has ended."""

    def __init__(self, cache: Cache, api: Api) -> None:
        self._cache = cache
        self._api = api
        self._answers: OrderedDict[tuple[str, str, str], tuple[float, Pod | None]] = OrderedDict()
        self._questions = ASKED_BURST
        self._counted_s = time.monotonic()

    async def find(self, namespace: str, name: str, uid: str) -> Pod | None:
        """
        The pod, or None where it is not there, another of that name is, or it was not injected.

        Raises:
            Refused: the API server does not answer, or too many lookups are in progress.
        """
        cached = self._cache.get(namespace, name)
        if cached is not None and cached.uid == uid:
            return cached
        if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
            return None
        key, now_s = (namespace, name, uid), time.monotonic()
        until_s, pod = self._answers.get(key, (0.0, None))
        if now_s >= until_s:
            self._count_question(now_s)
            pod = await self._ask(namespace, name, uid)
            self._answers[key] = now_s + REMEMBERED_S, pod
            self._answers.move_to_end(key)
            while len(self._answers) > MAX_REMEMBERED:
                self._answers.popitem(last=False)
        return pod

    def _count_question(self, now_s: float) -> None:
        self._questions = min(ASKED_BURST, self._questions + (now_s - self._counted_s) * ASKED_PER_S)
        self._counted_s = now_s
        if self._questions < 1:
            raise Refused(Result.BUSY, "too many lookups of unknown pods; try again")
        self._questions -= 1

    async def _ask(self, namespace: str, name: str, uid: str) -> Pod | None:
        try:
            pod = project(await self._api.get(paths.PODS.one(namespace, name), metadata_only=True))
        except client.NotFound:
            return None
        except (client.ApiError, client.Unreachable) as err:
            raise Refused(
                Result.UNAVAILABLE, "the pod cannot be looked up now, because the API server does not answer"
            ) from err
        return pod if pod is not None and pod.uid == uid else None
