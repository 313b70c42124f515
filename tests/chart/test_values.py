"""
The whole of: that the chart's values are documented, and that what is wrong with them is refused with the place where it is wrong.

Called from: pytest.
Must never: list the keys by hand: they come from values.yaml and values.schema.json.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
import yaml

from support import helm
from support.release import CHART, HelmFailed

VALUES: Final[dict[str, Any]] = yaml.safe_load((CHART / "values.yaml").read_text())
LINES: Final = (CHART / "values.yaml").read_text().splitlines()
SCHEMA: Final[dict[str, Any]] = json.loads((CHART / "values.schema.json").read_text())
NOT_OURS: Final = {"global"}
"""What helm itself gives to charts."""
REFUSED: Final[list[tuple[dict[str, Any], str]]] = [
    ({"replicas": 2}, "''.*replicas"),
    ({"webhook": {"failurePolicy": "Maybe"}}, "/webhook/failurePolicy'.*Fail.*Ignore"),
    ({"webhook": {"replicas": 0}}, "/webhook/replicas'"),
    ({"controller": {"replicas": "2"}}, "/controller/replicas'.*string.*integer"),
    ({"controller": {"hostNetwork": True}}, "/controller'.*hostNetwork"),
    ({"webhook": {"timeoutSeconds": 31}}, "/webhook/timeoutSeconds'"),
    ({"webhook": {"resources": {"limits": None}}}, "/webhook/resources'.*limits"),
    ({"webhook": {"nodeSelector": {"zone": 1}}}, "/webhook/nodeSelector/zone'"),
    ({"certificates": {"mode": "Provided"}}, "/certificates/caBundle'.*BEGIN CERTIFICATE"),
    ({"certificates": {"mode": "self"}}, "/certificates/mode'.*Self.*CertManager.*Provided"),
    ({"certificates": {"issuerRef": {"kind": "Vault"}}}, "/certificates/issuerRef/kind'"),
    ({"certificates": {"secretName": ""}}, "/certificates/secretName'"),
    ({"sidecar": {"liveness": "On"}}, "/sidecar/liveness'.*Off.*Exec"),
    ({"sidecar": {"runAsUser": 0}}, "/sidecar/runAsUser'"),
    ({"sidecar": {"metricsPort": 65536}}, "/sidecar/metricsPort'"),
    ({"sidecar": {"allowedImages": ["a,b"]}}, "/sidecar/allowedImages/0'"),
    ({"image": {"pullPolicy": "Sometimes"}}, "/image/pullPolicy'"),
    ({"image": {"repository": ""}}, "/image/repository'"),
    ({"imagePullSecrets": ["registry"]}, "/imagePullSecrets/0'"),
    ({"logLevel": "TRACE"}, "/logLevel'"),
    ({"failurePolicy": "Deny"}, "/failurePolicy'"),
    ({"monitoring": {"serviceMonitor": {"interval": "30"}}}, "/monitoring/serviceMonitor/interval'"),
    ({"monitoring": {"prometheusRule": {"recoveryPointSeconds": 0}}}, "recoveryPointSeconds'"),
    ({"webhook": {"port": 0}}, "/webhook/port'"),
    ({"webhook": {"apiServer": {"clientCA": "ca.crt"}}}, "/webhook/apiServer/clientCA'.*BEGIN CERTIFICATE"),
    ({"webhook": {"apiServer": {"clientNames": ["a,b"]}}}, "/webhook/apiServer/clientNames/0'"),
    ({"networkPolicy": {"apiServerCIDRs": ["10.0.0.1"]}}, "/networkPolicy/apiServerCIDRs/0'"),
    ({"enabled": "yes"}, "/enabled'.*string.*boolean"),
    ({"crds": {"keep": "no"}}, "/crds/keep'.*string.*boolean"),
]
"""Values, and what the message has to say: the path, and what is allowed where that is a list."""


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[json.dumps(values) for values, _ in REFUSED])
def test_a_wrong_value_is_refused_and_the_message_names_its_place(values: dict[str, Any], said: str) -> None:
    """helm renders nothing, and says where the value is that the schema does not allow."""
    with pytest.raises(HelmFailed) as refusal:
        helm.render(values)
    assert re.search(f"at '.*{said}" if said.startswith("/") else said, str(refusal.value))


def test_every_value_is_in_the_schema() -> None:
    """Each key of values.yaml has a place in the schema, and every object that we define refuses keys without one."""
    missing = [".".join(path) for path in _paths(VALUES) if _schema_of(path) is None]
    assert missing == []
    is_open = [".".join(path) for path, found in _objects(SCHEMA, ()) if found.get("additionalProperties") is not False]
    assert is_open == []


def test_everything_in_the_schema_is_a_value() -> None:
    """Nothing is allowed that values.yaml does not show with its default."""
    known = set(_paths(VALUES))
    defined = {(*path, name) for path, found in _objects(SCHEMA, ()) for name in found["properties"]}
    # Where the default is an empty object, its keys are in the comment.
    shown = {path for path in defined if path[0] not in NOT_OURS and _value(path[:-1]) != {}}
    assert sorted(shown - known) == []


def test_every_value_has_a_comment_of_its_own() -> None:
    """Right above each key there is a comment that begins with `# -- `."""
    bare = []
    for number, line in enumerate(LINES):
        if not re.match(r" *\w+:", line):
            continue
        above = number - 1
        while LINES[above].lstrip().startswith("#") and not LINES[above].lstrip().startswith("# -- "):
            above -= 1
        if not LINES[above].lstrip().startswith("# -- "):
            bare.append(f"{number + 1}: {line.strip()}")
    assert bare == []


def test_a_list_of_images_reaches_the_operator_as_one_variable() -> None:
    """What is a list in the values is joined with commas, as the settings read it; large numbers stay whole numbers."""
    values = {"sidecar": {"allowedImages": ["r.example/a", "r.example/b"], "runAsUser": 1000690000}}
    (container,) = helm.one(helm.render(values), "Deployment", "pillion-webhook")["spec"]["template"]["spec"][
        "containers"
    ]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert given["PILLION_ALLOWED_IMAGES"] == "r.example/a,r.example/b"
    assert given["PILLION_RUN_AS_USER"] == "1000690000"


def _paths(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield (*path, name)
            yield from _paths(inner, (*path, name))


def _value(path: tuple[str, ...]) -> Any:
    found: Any = VALUES
    for name in path:
        found = found[name]
    return found


def _resolved(found: dict[str, Any]) -> dict[str, Any]:
    reference = found.get("$ref")
    return SCHEMA["definitions"][reference.rsplit("/", 1)[1]] if reference else found


def _schema_of(path: tuple[str, ...]) -> dict[str, Any] | None:
    found = SCHEMA
    for name in path:
        inner = found.get("properties", {}).get(name)
        if inner is None and "properties" not in found:
            # Free keys: labels, selectors, quantities.
            inner = found["additionalProperties"] if isinstance(found.get("additionalProperties"), dict) else {}
        if inner is None:
            return None
        found = _resolved(inner)
    return found


def _objects(found: dict[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The objects of the schema that list their keys."""
    if "properties" in found:
        yield path, found
        for name, inner in found["properties"].items():
            yield from _objects(_resolved(inner), (*path, name))
