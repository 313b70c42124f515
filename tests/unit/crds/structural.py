"""
The whole of: what an API server does with an object and the schema of its CRD, as far as our two schemas go: it drops nulls,
fills in defaults, refuses what it does not know, checks values, and evaluates rules.

Called from: the tests of the CRDs. The rules are CEL; each is mirrored here by hand, in a table whose keys are the rules' own
text, so that a rule that changes without its mirror is noticed. The API server itself evaluates them in tests/cluster.
Must never: let a keyword of a schema go by that it does not understand.
"""

import copy
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import yaml

from pillion.wire import names, object_store

CRDS: Final = Path(__file__).parents[3] / "crds"
Schema = dict[str, Any]

_FACTORS: Final = {"": Decimal(1), "m": Decimal("0.001")} | {
    suffix: Decimal(base) ** power
    for base, suffixes in ((1000, "k M G T P E"), (1024, "Ki Mi Gi Ti Pi Ei"))
    for power, suffix in enumerate(suffixes.split(), 1)
}


def quantity(value: object) -> Decimal:
    """CEL's `quantity(string(value))`."""
    match = re.fullmatch(r"(-?[0-9.]+)([a-zA-Z]*)", str(value))
    assert match, f"the pattern of the field let {value!r} pass"
    return Decimal(match[1]) * _FACTORS[match[2]]


def _fits(name: str) -> Callable[[Any], bool]:
    def holds(self: Any) -> bool:
        requests, limits = self.get("requests", {}), self.get("limits", {})
        return name not in requests or name not in limits or quantity(requests[name]) <= quantity(limits[name])

    return holds


def _fits_text(name: str) -> str:
    return (
        f"!has(self.requests) || !has(self.limits) || !has(self.requests.{name}) || !has(self.limits.{name}) || "
        f"quantity(string(self.requests.{name})).compareTo(quantity(string(self.limits.{name}))) <= 0"
    )


def _between(most: str) -> str:
    return (
        f"quantity(string(self)).isGreaterThan(quantity('0')) && quantity(string(self)).isLessThan(quantity('{most}'))"
    )


_AWS: Final = "['" + "', '".join(object_store.AWS_CREDENTIALS) + "']"
_ROLE: Final = (
    "!has(self.storage.objectStore) || !has(self.storage.objectStore.credentials) || "
    "!has(self.storage.objectStore.credentials.awsRoleArn) || !has(self.sidecar.env) || "
    f"!self.sidecar.env.exists(each, each.name in {_AWS})"
)
_S3_ALONE: Final = (
    "self.url.startsWith('s3://') || !(has(self.region) || has(self.encryption) || self.requesterPays || "
    "has(self.credentials) && has(self.credentials.awsRoleArn) || self.checksum in ['CRC64NVME', 'SHA256'])"
)


def _selects_once(self: Any) -> bool:
    role = self["storage"].get("objectStore", {}).get("credentials", {}).get("awsRoleArn")
    return role is None or all(
        each["name"] not in object_store.AWS_CREDENTIALS for each in self["sidecar"].get("env", [])
    )


def _fits_the_scheme(self: Any) -> bool:
    of_s3 = (
        {"region", "encryption"} & self.keys() or self["requesterPays"] or "awsRoleArn" in self.get("credentials", {})
    )
    return self["url"].startswith("s3://") or not (of_s3 or self["checksum"] in ("CRC64NVME", "SHA256"))


RULES: Final[dict[str, Callable[[Any], bool]]] = {
    "has(self.periodSteps) || has(self.periodSeconds) || has(self.auto)": lambda self: bool(
        {"periodSteps", "periodSeconds", "auto"} & self.keys()
    ),
    "!has(self.auto) || !(has(self.periodSteps) || has(self.periodSeconds))": lambda self: (
        "auto" not in self or not {"periodSteps", "periodSeconds"} & self.keys()
    ),
    "!has(self.periodSteps) || !has(self.localSteps) || self.localSteps < self.periodSteps": lambda self: (
        not {"periodSteps", "localSteps"} <= self.keys() or self["localSteps"] < self["periodSteps"]
    ),
    "!has(self.localSteps) || !has(self.snapshotSteps) || self.snapshotSteps < self.localSteps": lambda self: (
        not {"localSteps", "snapshotSteps"} <= self.keys() or self["snapshotSteps"] < self["localSteps"]
    ),
    "!has(self.trigger.localSteps) || has(self.storage.local)": lambda self: (
        "localSteps" not in self["trigger"] or "local" in self["storage"]
    ),
    "has(self.emptyDir) != has(self.hostPath)": lambda self: ("emptyDir" in self) != ("hostPath" in self),
    "!has(self.local) || !has(self.writer)": lambda self: not {"local", "writer"} <= self.keys(),
    "!has(self.periodSteps) || !has(self.snapshotSteps) || self.snapshotSteps < self.periodSteps": lambda self: (
        not {"periodSteps", "snapshotSteps"} <= self.keys() or self["snapshotSteps"] < self["periodSteps"]
    ),
    "has(self.sizeLimit) || self.memoryAccounting == 'Workload'": lambda self: (
        "sizeLimit" in self or self["memoryAccounting"] == "Workload"
    ),
    _between("1Ei"): lambda self: 0 < quantity(self) < 2**60,
    _between("1M"): lambda self: 0 < quantity(self) < 10**6,
    "!self.matches('(^|/)[.][.](/|$)')": lambda self: re.search("(^|/)[.][.](/|$)", self) is None,
    "!has(self.keepEverySteps) || has(self.keepLast)": lambda self: "keepEverySteps" not in self or "keepLast" in self,
    "!has(self.from) || self.mode == 'Latest'": lambda self: "from" not in self or self["mode"] == "Latest",
    "!has(self.keepBest) || has(self.keepLast)": lambda self: "keepBest" not in self or "keepLast" in self,
    "(self.mode == 'Step') == has(self.step)": lambda self: (self["mode"] == "Step") == ("step" in self),
    _fits_text("cpu"): _fits("cpu"),
    _fits_text("memory"): _fits("memory"),
    "has(self.value) != has(self.valueFrom)": lambda self: ("value" in self) != ("valueFrom" in self),
    "!(self in [" + ", ".join(f"'{each}'" for each in names.SET_BY_INJECTION) + "])": (
        lambda self: self not in names.SET_BY_INJECTION
    ),
    "has(self.persistentVolumeClaim) != has(self.objectStore)": lambda self: (
        ("persistentVolumeClaim" in self) != ("objectStore" in self)
    ),
    "!has(self.objectStore) || !has(self.writer)": lambda self: not {"objectStore", "writer"} <= self.keys(),
    "has(self.secret) != has(self.awsRoleArn)": lambda self: ("secret" in self) != ("awsRoleArn" in self),
    _S3_ALONE: _fits_the_scheme,
    "!self.url.startsWith('az://') || !has(self.storageClass)": lambda self: (
        not self["url"].startswith("az://") or "storageClass" not in self
    ),
    "!self.matches('/[.][.]?(/|$)')": lambda self: re.search("/[.][.]?(/|$)", self) is None,
    "!(self in ['.', '..'])": lambda self: self not in (".", ".."),
    "!(self in ['GLACIER', 'DEEP_ARCHIVE'])": lambda self: self not in object_store.UNREADABLE_CLASSES,
    "quantity(string(self)).compareTo(quantity('8Mi')) >= 0 && quantity(string(self)).compareTo(quantity('1Gi')) <= 0": (
        lambda self: 2**23 <= quantity(self) <= 2**30
    ),
    "quantity(string(self)).compareTo(quantity('1Mi')) >= 0 && quantity(string(self)).isLessThan(quantity('1Ei'))": (
        lambda self: 2**20 <= quantity(self) < 2**60
    ),
    _ROLE: _selects_once,
    # A transition rule: there is no old object where one is made.
    "self == oldSelf": lambda self: True,
}
"""By the text of a CEL rule: what it says, for an object with its defaults."""

_ANNOTATIONS: Final = {
    "description",
    "default",
    "format",
    "anyOf",
    "x-kubernetes-list-type",
}


def read(name: str) -> Schema:
    """A CRD, by the plural of its kind."""
    loaded: Schema = yaml.safe_load((CRDS / f"pillion.dev_{name}.yaml").read_text())
    return loaded


def schema_of(crd: Schema) -> Schema:
    """The schema of its one version."""
    (version,) = crd["spec"]["versions"]
    schema: Schema = version["schema"]["openAPIV3Schema"]
    return schema


def walk(schema: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    """Each schema in a schema, with its path."""
    yield path, schema
    for name, each in schema.get("properties", {}).items():
        yield from walk(each, f"{path}.{name}".lstrip("."))
    if "items" in schema:
        yield from walk(schema["items"], f"{path}[]")


def defaulted(schema: Schema, value: Any) -> Any:
    """The value without nulls and with the defaults, as the API server stores it."""
    if isinstance(value, dict) and "properties" in schema:
        properties = schema["properties"]
        given = {key: each for key, each in value.items() if each is not None or key not in properties}
        for key, each in properties.items():
            if key not in given and "default" in each:
                given[key] = copy.deepcopy(each["default"])
        return {key: defaulted(properties.get(key, {}), each) for key, each in given.items()}
    if isinstance(value, list) and "items" in schema:
        return [defaulted(schema["items"], each) for each in value]
    return value


def problems(schema: Schema, value: Any, path: str = "") -> list[str]:
    """The paths of what is wrong in a value that has its defaults; rules only where the rest is right."""
    found = [where for where, _ in _wrong(schema, value, path)]
    if found:
        return found
    return [f"{where}: {text}" for where, text in _broken(schema, value, path)]


def _wrong(schema: Schema, value: Any, path: str) -> Iterator[tuple[str, str]]:
    kind, is_int_or_string = schema.get("type"), schema.get("x-kubernetes-int-or-string", False)
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    wanted: Any = (int, str) if is_int_or_string else kinds[str(kind)]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        yield path, f"is no {kind}"
        return
    for keyword, allowed in schema.items():
        match keyword:
            case "enum":
                holds = value in allowed
            case "minimum":
                holds = value >= allowed
            case "maximum":
                holds = value <= allowed
            case "minLength":
                holds = len(value) >= allowed
            case "maxLength":
                holds = not isinstance(value, str) or len(value) <= allowed
            case "maxItems":
                holds = len(value) <= allowed
            case "pattern":
                assert allowed.startswith("^")
                assert allowed.endswith("$")
                # \Z: to the API server's engine, $ is the end of the text and not also the place before a last newline.
                holds = not isinstance(value, str) or re.search(f"{allowed[:-1]}\\Z", value) is not None
            case "required":
                holds = set(allowed) <= value.keys()
            case "x-kubernetes-list-map-keys":
                keys = [tuple(each.get(key) for key in allowed) for each in value if isinstance(each, dict)]
                holds = len(set(keys)) == len(keys)
            case "type" | "properties" | "items" | "x-kubernetes-int-or-string" | "x-kubernetes-validations":
                holds = True
            case "x-kubernetes-preserve-unknown-fields":
                holds = True
            case _:
                assert keyword in _ANNOTATIONS, keyword
                holds = True
        if not holds:
            yield path, f"{keyword} {allowed}"
    if (
        isinstance(value, int)
        and schema.get("format") in ("int32", "int64")
        and abs(value) >= 2 ** (int(schema["format"][3:]) - 1)
    ):
        yield path, "is too large"
    for key, each in value.items() if isinstance(value, dict) and "properties" in schema else ():
        at = f"{path}.{key}".lstrip(".")
        if key in schema["properties"]:
            yield from _wrong(schema["properties"][key], each, at)
        else:
            yield at, "is unknown"
    for index, each in enumerate(value) if isinstance(value, list) else ():
        yield from _wrong(schema["items"], each, f"{path}[{index}]")


def _broken(schema: Schema, value: Any, path: str) -> Iterator[tuple[str, str]]:
    for rule in schema.get("x-kubernetes-validations", []):
        if not RULES[rule["rule"]](value):
            yield path, rule["message"]
    for key, each in value.items() if isinstance(value, dict) else ():
        if key in schema.get("properties", {}):
            yield from _broken(schema["properties"][key], each, f"{path}.{key}".lstrip("."))
    for index, each in enumerate(value) if isinstance(value, list) else ():
        yield from _broken(schema["items"], each, f"{path}[{index}]")
