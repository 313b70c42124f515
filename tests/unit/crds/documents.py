"""
The whole of: specs of a CheckpointPolicy that are good, and specs that are bad, each for one reason.

Called from: the tests of the CRDs, and of the API server in tests/cluster.
Must never: hold one of which schema and model think differently.
"""

import copy
from typing import Any, Final

_LEAST: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": 200},
    "staging": {"sizeLimit": "96Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}},
}
_WHOLE: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": 200, "periodSeconds": 600, "snapshotSteps": 10, "onTermination": "Save"},
    "staging": {"sizeLimit": "96Gi", "slots": 2, "overlap": "Wait", "memoryAccounting": "Sidecar"},
    "store": "Prefix",
    "storage": {
        "persistentVolumeClaim": {"claimName": "checkpoints", "subPath": "runs"},
        "writer": {"name": "company.io:Writer", "arguments": {"compress": True, "levels": [1, None]}},
    },
    "retention": {"keepLast": 3, "keepEverySteps": 5000},
    "restore": {"mode": "Step", "step": 0, "onMissing": "Fail"},
    "drain": {"timeoutSeconds": 300},
    "failurePolicy": "Ignore",
    "suspend": True,
    "sidecar": {
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": 2, "memory": "1Gi"}},
        "runAsUser": 0,
        "runAsGroup": 0,
        "env": [
            {"name": "AWS_REGION", "value": "here"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "token"}}},
        ],
        "envFrom": [{"secretRef": {"name": "s3-credentials"}}],
    },
}
_ABSENT: Final = object()


def _with(path: str, value: object, base: dict[str, Any] = _WHOLE) -> dict[str, Any]:
    document = copy.deepcopy(base)
    *sections, last = path.split(".")
    into = document
    for section in sections:
        into = into.setdefault(section, {})
    if value is _ABSENT:
        del into[last]
    else:
        into[last] = value
    return document


GOOD: Final[dict[str, dict[str, Any]]] = {
    "the least": _LEAST,
    "the whole": _WHOLE,
    "nulls are absent": _LEAST | {"retention": None, "restore": {"step": None}, "store": None},
    "a period in seconds only": _LEAST | {"trigger": {"periodSeconds": 60}},
    "no size where the workload pays": _LEAST | {"staging": {"memoryAccounting": "Workload"}},
    "a size as a number": _with("staging.sizeLimit", 2**30),
    "a size with a fraction": _with("staging.sizeLimit", "1.5G"),
    "a binary size with a fraction": _with("staging.sizeLimit", "1.75Ti"),
    "empty resources": _with("sidecar.resources", {}),
    "limits only": _with("sidecar.resources", {"limits": {"memory": "2Gi"}}),
    "equal amounts spelled apart": _with("sidecar.resources.limits", {"cpu": "0.5", "memory": "1024Mi"}),
    "no restore": _with("restore", {"mode": "None"}),
}
BAD: Final[dict[str, dict[str, Any]]] = {
    "nothing": {},
    "no trigger": _with("trigger", _ABSENT, _LEAST),
    "no period": _with("trigger", {"snapshotSteps": 5}, _LEAST),
    "a period of zero": _with("trigger.periodSteps", 0),
    "a period that is text": _with("trigger.periodSteps", "200"),
    "a period that is true": _with("trigger.periodSeconds", True),
    "a period above int64": _with("trigger.periodSteps", 2**63),
    "snapshots as rare as saves": _with("trigger.snapshotSteps", 200),
    "an unknown word": _with("trigger.onTermination", "save"),
    "no staging": _with("staging", _ABSENT, _LEAST),
    "no size": _with("staging", {"slots": 2}, _LEAST),
    "no size, said": _with("staging", {"memoryAccounting": "Sidecar"}, _LEAST),
    "a size of zero": _with("staging.sizeLimit", "0"),
    "a negative size": _with("staging.sizeLimit", -1),
    "a size of half a byte": _with("staging.sizeLimit", "0.5"),
    "a size in thousandths": _with("staging.sizeLimit", "1500m"),
    "a size that no machine has": _with("staging.sizeLimit", "16Ei"),
    "one slot": _with("staging.slots", 1),
    "too many slots": _with("staging.slots", 17),
    "an unknown overlap": _with("staging.overlap", "Drop"),
    "an unknown accounting": _with("staging.memoryAccounting", "Both"),
    "an unknown store": _with("store", "TCP"),
    "no storage": _with("storage", _ABSENT, _LEAST),
    "no claim": _with("storage", {}, _LEAST),
    "a path": _with("storage.path", "/data"),
    "a path alone": _with("storage", {"path": "/data"}, _LEAST),
    "a claim without a name": _with("storage.persistentVolumeClaim.claimName", _ABSENT),
    "a claim's name in capitals": _with("storage.persistentVolumeClaim.claimName", "Checkpoints"),
    "a sub path upwards": _with("storage.persistentVolumeClaim.subPath", "runs/../.."),
    "a sub path from the root": _with("storage.persistentVolumeClaim.subPath", "/runs"),
    "an empty sub path": _with("storage.persistentVolumeClaim.subPath", ""),
    "a writer without a class": _with("storage.writer.name", "company.io"),
    "a writer without a name": _with("storage.writer", {"arguments": {}}),
    "arguments that are a list": _with("storage.writer.arguments", [1]),
    "keeping none": _with("retention.keepLast", 0),
    "keeping multiples without the last": _with("retention", {"keepEverySteps": 5}),
    "a mode without its step": _with("restore", {"mode": "Step"}),
    "a step without its mode": _with("restore", {"step": 5}),
    "a negative step": _with("restore.step", -1),
    "an unknown mode": _with("restore", {"mode": "Newest"}),
    "an unknown onMissing": _with("restore.onMissing", "fail"),
    "no time to drain": _with("drain.timeoutSeconds", 0),
    "more than a day to drain": _with("drain.timeoutSeconds", 86_401),
    "an unknown failure policy": _with("failurePolicy", "Deny"),
    "a suspension that is text": _with("suspend", "true"),
    "a CPU request above its limit": _with("sidecar.resources.requests.cpu", "2500m"),
    "a memory request above its limit": _with("sidecar.resources.requests.memory", "1025Mi"),
    "a CPU finer than a thousandth": _with("sidecar.resources.limits.cpu", "0.0001"),
    "a resource that a sidecar does not take": _with("sidecar.resources.limits.gpu", 1),
    "a negative user": _with("sidecar.runAsUser", -1),
    "a user of 33 bits": _with("sidecar.runAsUser", 2**32),
    "a variable twice": _with("sidecar.env", [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]),
    "a variable without a value": _with("sidecar.env", [{"name": "A"}]),
    "a variable that injection sets": _with("sidecar.env", [{"name": "PILLION_ROOT", "value": "/elsewhere"}]),
    "variables that are an object": _with("sidecar.env", {"A": "1"}),
    "a source that is no Secret": _with("sidecar.envFrom", [{"configMapRef": {"name": "a"}}]),
    "a Secret without a name": _with("sidecar.envFrom", [{"secretRef": {}}]),
    "a field that is not there": _with("trigger.periodMinutes", 5),
}
