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
    "retention": {
        "keepLast": 3,
        "keepEverySteps": 5000,
        "keepBest": {"metric": "eval loss", "mode": "Min", "count": 2},
        "maxAge": "30d",
        "maxBytes": "2Ti",
    },
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
_IN_A_BUCKET: Final[dict[str, Any]] = _LEAST | {"storage": {"objectStore": {"url": "s3://bucket/prefix"}}}
_WHOLE_BUCKET: Final[dict[str, Any]] = {
    "url": "s3://bucket/team=llm/runs",
    "endpoint": "https://minio.example:9000",
    "region": "eu-central-1",
    "caBundle": {"configMap": "corp-ca", "key": "root.pem"},
    "credentials": {"awsRoleArn": "arn:aws:iam::123456789012:role/team/checkpoints"},
    "encryption": {"kmsKeyId": "arn:aws:kms:us-east-1:123456789012:key/abcd-1234"},
    "requesterPays": True,
    "storageClass": "STANDARD_IA",
    "objectSize": "256Mi",
    "parallelism": 8,
    "bandwidthLimit": "2Gi",
    "checksum": "SHA256",
}
_ON_DISK: Final[dict[str, Any]] = _LEAST | {"storage": _LEAST["storage"] | {"local": {"emptyDir": {}}}}
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


def _in_a_bucket(field: str, value: object) -> dict[str, Any]:
    return _with(f"storage.objectStore.{field}", value, _IN_A_BUCKET)


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
    "an age without a count": _with("retention", {"maxAge": "90m"}),
    "a quota without a count": _with("retention", {"maxBytes": 2**40}),
    "no restore": _with("restore", {"mode": "None"}),
    "a bucket": _IN_A_BUCKET,
    "a bucket and all that can be said of it": _LEAST | {"storage": {"objectStore": _WHOLE_BUCKET}},
    "a bucket without a folder": _in_a_bucket("url", "s3://bucket/"),
    "a bucket at Google": _in_a_bucket("url", "gs://bucket_of.ours/runs"),
    "a container at Azure": _in_a_bucket("url", "az://container/runs"),
    "a class of Google": _LEAST | {"storage": {"objectStore": {"url": "gs://bucket", "storageClass": "NEARLINE"}}},
    "credentials in a Secret": _in_a_bucket("credentials", {"secret": "s3-writer"}),
    "a Secret beside variables of AWS": _in_a_bucket("credentials", {"secret": "s3-writer"})
    | {"sidecar": {"env": [{"name": "AWS_ROLE_ARN", "value": "a"}]}},
    "a disk for the pod": _with("storage.local", {"emptyDir": {}}, _LEAST),
    "a disk of the node in front of a bucket": _with(
        "storage.local", {"hostPath": {"path": "/mnt/disks/0"}}, _IN_A_BUCKET
    ),
    "an interval by itself": _LEAST | {"trigger": {"auto": {}}},
    "an interval by itself within bounds": _LEAST
    | {"trigger": {"auto": {"overheadPercent": 3, "maxSeconds": 900}, "snapshotSteps": 5}},
    "a disk and saves for it": _LEAST
    | {
        "trigger": {"periodSteps": 200, "localSteps": 20, "snapshotSteps": 2},
        "storage": _LEAST["storage"] | {"local": {"emptyDir": {"sizeLimit": "1Ti"}}},
    },
    "the least object": _in_a_bucket("objectSize", "8Mi"),
    "the largest object": _in_a_bucket("objectSize", 2**30),
}
_ELSEWHERE: Final[dict[str, dict[str, Any]]] = {
    f"{field} at {scheme}": _LEAST
    | {"storage": {"objectStore": {"url": f"{scheme}://bucket", field: _WHOLE_BUCKET[field]}}}
    for scheme, fields in (
        ("gs", ("region", "encryption", "requesterPays", "credentials", "checksum")),
        ("az", ("region", "encryption", "requesterPays", "credentials", "checksum", "storageClass")),
    )
    for field in fields
}
BAD: Final[dict[str, dict[str, Any]]] = {
    "nothing": {},
    "no trigger": _with("trigger", _ABSENT, _LEAST),
    "no period": _with("trigger", {"snapshotSteps": 5}, _LEAST),
    "a period of zero": _with("trigger.periodSteps", 0),
    "a period that is text": _with("trigger.periodSteps", "200"),
    "a period that is true": _with("trigger.periodSeconds", True),
    "a period above int64": _with("trigger.periodSteps", 2**63),
    "two ways to choose a period": _LEAST | {"trigger": {"auto": {}, "periodSteps": 200}},
    "an interval by itself beside seconds": _LEAST | {"trigger": {"auto": {}, "periodSeconds": 60}},
    "an overhead of nothing": _LEAST | {"trigger": {"auto": {"overheadPercent": 0}}},
    "an overhead of most of the time": _LEAST | {"trigger": {"auto": {"overheadPercent": 51}}},
    "an interval of more than a week": _LEAST | {"trigger": {"auto": {"maxSeconds": 604_801}}},
    "snapshots as rare as saves": _with("trigger.snapshotSteps", 200),
    "saves for a disk that is not there": _with("trigger.localSteps", 20, _LEAST),
    "saves for a disk as rare as saves": _ON_DISK | {"trigger": {"periodSteps": 200, "localSteps": 200}},
    "snapshots as rare as saves for a disk": _ON_DISK
    | {"trigger": {"periodSteps": 200, "localSteps": 20, "snapshotSteps": 20}},
    "a disk that is nowhere": _with("storage.local", {}, _LEAST),
    "a disk that is in two places": _with("storage.local", {"emptyDir": {}, "hostPath": {"path": "/a"}}, _LEAST),
    "a disk by its path": _with("storage.local", {"path": "/a"}, _LEAST),
    "a disk of the node with a relative path": _with("storage.local", {"hostPath": {"path": "a"}}, _LEAST),
    "a disk of the node above another": _with("storage.local", {"hostPath": {"path": "/a/../b"}}, _LEAST),
    "a disk of the node without a path": _with("storage.local", {"hostPath": {}}, _LEAST),
    "a disk of no size": _with("storage.local", {"emptyDir": {"sizeLimit": "0"}}, _LEAST),
    "a disk and a writer": _with("storage.local", {"emptyDir": {}}, _WHOLE),
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
    "another job with a step of the own": _with("restore", {"mode": "Step", "step": 3, "from": {"job": "a"}}),
    "another job and nothing": _with("restore", {"mode": "None", "from": {"job": "a"}}),
    "a job above the own": _with("restore", {"from": {"job": "../a"}}),
    "a step of no job": _with("restore", {"from": {"step": 1}}),
    "an age without a unit": _with("retention", {"maxAge": 3600}),
    "an age of zero": _with("retention", {"maxAge": "0d"}),
    "an age of weeks": _with("retention", {"maxAge": "2w"}),
    "a quota of zero": _with("retention", {"maxBytes": "0"}),
    "a quota of half a byte": _with("retention", {"maxBytes": "0.5"}),
    "keeping the best without the last": _with("retention", {"keepBest": {"metric": "loss", "mode": "Min"}}),
    "keeping the best of nothing": _with("retention", {"keepLast": 1, "keepBest": {"mode": "Min"}}),
    "keeping the best of a direction": _with("retention", {"keepLast": 1, "keepBest": {"metric": "a", "mode": "min"}}),
    "keeping none of the best": _with(
        "retention", {"keepLast": 1, "keepBest": {"metric": "a", "mode": "Max", "count": 0}}
    ),
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
    **_ELSEWHERE,
    "a claim and a bucket": _with("storage.objectStore", {"url": "s3://bucket"}, _LEAST),
    "a writer to a bucket": _with("storage.writer", {"name": "a:B"}, _IN_A_BUCKET),
    "a bucket without a URL": _with("storage", {"objectStore": {}}, _LEAST),
    "a URL of no store": _in_a_bucket("url", "https://bucket.s3.amazonaws.com/prefix"),
    "a URL without a bucket": _in_a_bucket("url", "s3:///prefix"),
    "a bucket in capitals": _in_a_bucket("url", "s3://Bucket"),
    "a container with a point": _in_a_bucket("url", "az://a.container"),
    "a URL with credentials": _in_a_bucket("url", "s3://key:secret@bucket/prefix"),
    "a URL with a query": _in_a_bucket("url", "s3://bucket/prefix?versionId=1"),
    "a URL with an empty folder": _in_a_bucket("url", "s3://bucket//prefix"),
    "a URL upwards": _in_a_bucket("url", "s3://bucket/../other"),
    "a URL with a variable": _in_a_bucket("url", "s3://bucket/$(TOKEN)"),
    "a URL that is too long": _in_a_bucket("url", "s3://bucket/" + "a" * 501),
    "an endpoint without a scheme": _in_a_bucket("endpoint", "minio:9000"),
    "an endpoint with credentials": _in_a_bucket("endpoint", "https://key:secret@minio"),
    "a region that is none": _in_a_bucket("region", "eu central"),
    "certificates without their place": _in_a_bucket("caBundle", {"key": "ca.crt"}),
    "certificates in no file": _in_a_bucket("caBundle", {"configMap": "ca", "key": ".."}),
    "no credentials": _in_a_bucket("credentials", {}),
    "credentials twice": _in_a_bucket("credentials", {"secret": "a", "awsRoleArn": "arn:aws:iam::1:role/a"}),
    "a user as a role": _in_a_bucket("credentials", {"awsRoleArn": "arn:aws:iam::1:user/a"}),
    "a role and a key": _in_a_bucket("credentials", {"awsRoleArn": "arn:aws:iam::1:role/a"})
    | {"sidecar": {"env": [{"name": "AWS_ACCESS_KEY_ID", "value": "a"}]}},
    "an encryption without a key": _in_a_bucket("encryption", {}),
    "a class in small letters": _in_a_bucket("storageClass", "standard"),
    "a class that takes hours": _in_a_bucket("storageClass", "DEEP_ARCHIVE"),
    "an object that is too small": _in_a_bucket("objectSize", "8191Ki"),
    "an object that is too large": _in_a_bucket("objectSize", 2**30 + 1),
    "no request at all": _in_a_bucket("parallelism", 0),
    "too many requests": _in_a_bucket("parallelism", 65),
    "a thousandth of a bandwidth": _in_a_bucket("bandwidthLimit", "100m"),
    "an unknown checksum": _in_a_bucket("checksum", "CRC32C"),
    "a field that is not there": _with("trigger.periodMinutes", 5),
}

EXPLAINED: Final = {
    "no period": "at least one of periodSteps, periodSeconds and auto is needed",
    "snapshots as rare as saves": "snapshotSteps must be less than periodSteps",
    "no size": "sizeLimit is needed",
    "a size of zero": "must be a positive number of bytes below 1Ei",
    "a sub path upwards": "must be a relative directory without '..'",
    "keeping multiples without the last": "keepEverySteps needs keepLast",
    "a mode without its step": "step is the step to load with mode: Step",
    "a CPU request above its limit": "requests.cpu must be at most limits.cpu",
    "a memory request above its limit": "requests.memory must be at most limits.memory",
}
"""By a document of BAD that breaks a CEL rule: what a person reads of it. The cluster tests look for it in the answer of a real API server."""
