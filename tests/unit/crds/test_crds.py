"""
The whole of: the shape of the two CRDs, and that CheckpointPolicy's schema and its Python model are one.

Called from: pytest.
Must never: list a field of the policy by hand where the model can be walked.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import policy, quantities
from pillion_operator.injection import annotations, identity
from unit.crds import structural
from unit.crds.documents import BAD, EXPLAINED, GOOD

NAMES: Final = ("checkpointpolicies", "checkpoints")
SPEC: Final = structural.schema_of(structural.read("checkpointpolicies"))["properties"]["spec"]
NOT_IN_A_CLUSTER: Final = {"storage.path", "storage.local.path"}
INT64_MAX: Final = 2**63 - 1


def document_name(field: "dataclasses.Field[Any]") -> str:
    camel = re.sub("_(.)", lambda match: match[1].upper(), field.name)
    return str(field.metadata.get("name", camel))


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def agree(kind: Any, schema: structural.Schema, path: str = "") -> None:
    """Walk a section of the model and its schema side by side."""
    hints = get_type_hints(kind)
    fields = {document_name(each): each for each in dataclasses.fields(kind)}
    here = {name for name in fields if f"{path}{name}" not in NOT_IN_A_CLUSTER}
    assert schema["properties"].keys() == here, path
    for name in here:
        field, part, at = fields[name], schema["properties"][name], f"{path}{name}"
        hint = hints[field.name]
        is_list = get_origin(hint) is tuple
        wanted = hint if is_list else next((each for each in get_args(hint) if hint == each | None), hint)
        required = field.default is field.default_factory is dataclasses.MISSING
        assert not required or name in schema["required"], at
        if is_section(wanted):
            assert part["type"] == "object", at
            agree(wanted, part, f"{at}.")
            continue
        assert part.get("default", dataclasses.MISSING) == expected_default(field), at
        if isinstance(wanted, type) and issubclass(wanted, StrEnum):
            assert (part["type"], part["enum"]) == ("string", [each.value for each in wanted]), at
        elif field.metadata.get("unit") is quantities.DURATION:
            assert (part["type"], part["pattern"]) == ("string", "^[1-9][0-9]{0,5}[smhd]$"), at
        elif "unit" in field.metadata:
            assert part["x-kubernetes-int-or-string"] is True, at
            assert_spans(field.metadata, part["x-kubernetes-validations"][0]["rule"], at)
        elif wanted is bool:
            assert part["type"] == "boolean", at
        elif wanted is int:
            assert (part["type"], part["format"]) == ("integer", "int64"), at
            assert part["minimum"] == field.metadata.get("least", 1), at
            assert part.get("maximum", INT64_MAX) == field.metadata.get("most", INT64_MAX), at
        elif wanted is str:
            assert part["type"] == "string", at
            assert "pattern" in part, at
        elif is_list:
            assert (part["type"], part["maxItems"]) == ("array", field.metadata["most"]), at
            agree(get_args(wanted)[0], part["items"], f"{at}[].")
        else:
            assert wanted == Mapping[str, object], at
            assert part["x-kubernetes-preserve-unknown-fields"] is True, at


def assert_spans(rule: Mapping[str, Any], text: str, at: str) -> None:
    """The rule of a quantity's schema allows what the model's field allows; 1Ei is the most where the model has none."""
    show = rule["unit"].format
    least = (
        f".compareTo(quantity('{show(rule['least'])}')) >= 0" if "least" in rule else ".isGreaterThan(quantity('0'))"
    )
    assert least in text, at
    assert f".compareTo(quantity('{show(rule['most'])}')) <= 0" in text if "most" in rule else ".isLessThan(" in text, (
        at
    )


def expected_default(field: "dataclasses.Field[Any]") -> object:
    if "unit" in field.metadata and field.default is not None:
        return field.metadata["unit"].format(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    absent = field.default in (None, ()) or field.default is dataclasses.MISSING
    return dataclasses.MISSING if absent else field.default


def test_the_schema_of_a_policy_is_its_model() -> None:
    """Every field, type, enum, default and bound of the one is in the other; only `storage.path` ends with its pod."""
    agree(policy.Policy, SPEC)


def judged(document: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What the schema, and what the model, has against a spec; and both read the same where neither has anything."""
    whole = structural.defaulted(SPEC, document)
    by_schema = structural.problems(SPEC, whole)
    try:
        read = policy.parse(document, embedded=False)
    except policy.PolicyError as err:
        return by_schema, [str(each) for each in err.problems]
    if not by_schema:
        assert policy.parse(whole, embedded=False) == read
        plain = policy.dump(read)
        assert plain == policy.dump(policy.parse(plain, embedded=False))
        # What the model leaves unsaid, for readers of before, is what the schema fills in.
        assert policy.parse(structural.defaulted(SPEC, plain), embedded=False) == read
    return by_schema, []


@pytest.mark.parametrize("document", GOOD.values(), ids=GOOD.keys())
def test_what_is_good_is_good_to_both(document: dict[str, Any]) -> None:
    """Schema and model take the document, and read the same policy from it."""
    assert judged(document) == ([], [])


@pytest.mark.parametrize("document", BAD.values(), ids=BAD.keys())
def test_what_is_bad_is_bad_to_both(document: dict[str, Any]) -> None:
    """Schema and model refuse the document."""
    by_schema, by_model = judged(document)
    assert by_schema
    assert by_model


amounts = st.sampled_from(
    ["8Gi", "1.5Gi", "512Mi", "100", 5, 0, -1, "0", "1.1Gi", "9Ei", "", "x", "1m", 2**59, None, True]
)
cpus = st.sampled_from(["500m", "2", "0.5", 1, 0, "0", "0.0001", None, True])
counts = st.sampled_from([None, 0, 1, 2, 3, 16, 17, 86400, 86401, 2**63, "2", True, 1.5])
words = st.sampled_from(
    ["Save", "Skip", "Wait", "Latest", "Step", "None", "Fresh", "Fail", "Sidecar", "Workload", "Own", "x", None]
)
lists_of_amounts = st.fixed_dictionaries({}, optional={"cpu": cpus, "memory": amounts})
users = st.sampled_from([0, 1000, 2**31 - 1, 2**31, -1, "0", True, None])
secrets = st.fixed_dictionaries({}, optional={"name": st.sampled_from(["s3", "S3", "", None])})
variables = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["REGION", "AWS_ROLE_ARN", "a.b-c", "1A", "PILLION_ROOT", "A\n", None]),
        "value": st.sampled_from(["", "$(X)", "a\0", 1, None]),
        "valueFrom": st.fixed_dictionaries(
            {},
            optional={"secretKeyRef": st.fixed_dictionaries({"name": st.just("s3")}, optional={"key": st.just("id")})},
        ),
    },
)
sources = st.fixed_dictionaries({}, optional={"secretRef": secrets})
roles = st.sampled_from([None, "arn:aws:iam::123456789012:role/a", "arn:aws:iam::1:user/a"])
OBJECT_STORE: Final = {
    "url": st.sampled_from(
        ["s3://b-1/a", "gs://b_1.c", "az://b-1/", "az://b_1", "s3://b1", "s3://b.1/../a", "s3://B", None]
    ),
    "endpoint": st.sampled_from(["https://h:9000", "http://[::1]:1/a", "h", "https://u:p@h", "https://h?a", None]),
    "region": st.sampled_from(["eu-central-1", "", "a b", None]),
    "caBundle": st.fixed_dictionaries(
        {},
        optional={"configMap": st.sampled_from(["ca", "CA", None]), "key": st.sampled_from(["a.pem", "..", "/", None])},
    ),
    "credentials": st.fixed_dictionaries(
        {}, optional={"secret": st.sampled_from(["s3", "S3", None]), "awsRoleArn": roles}
    ),
    "encryption": st.fixed_dictionaries({}, optional={"kmsKeyId": st.sampled_from(["alias/a", "a b", None])}),
    "requesterPays": st.sampled_from([True, False, None, 1]),
    "storageClass": st.sampled_from(["STANDARD", "GLACIER", "GLACIER_IR", "standard", None]),
    "objectSize": st.sampled_from(["8Mi", "1Gi", 2**23, 2**23 - 1, 2**30 + 1, "1025Mi", "128", "0.5Gi", None]),
    "parallelism": st.sampled_from([1, 64, 65, 0, None]),
    "bandwidthLimit": st.sampled_from(["1Mi", "2Gi", "100m", 2**20 - 1, "1Ei", None]),
    "checksum": st.sampled_from(["Auto", "CRC64NVME", "SHA256", "None", "CRC32C", None]),
}
best = st.fixed_dictionaries(
    {},
    optional={
        "metric": st.sampled_from(["loss", "a b", "", "a\n", "a" * 129, 1, None]),
        "mode": st.sampled_from(["Min", "Max", "min", "", None]),
        "count": counts,
    },
)
specs = st.fixed_dictionaries(
    {},
    optional={
        "trigger": st.fixed_dictionaries(
            {},
            optional={"periodSteps": counts, "periodSeconds": counts, "snapshotSteps": counts, "onTermination": words},
        ),
        "staging": st.fixed_dictionaries(
            {}, optional={"sizeLimit": amounts, "slots": counts, "overlap": words, "memoryAccounting": words}
        ),
        "store": words,
        "storage": st.fixed_dictionaries(
            {},
            optional={
                "persistentVolumeClaim": st.fixed_dictionaries(
                    {},
                    optional={
                        "claimName": st.sampled_from(["a", "a.b-c", "A", "-a", "", "a\n", 1, None]),
                        "subPath": st.sampled_from(["a", "a/..b", "..", "a/../b", "/a", "", "a\n", None]),
                    },
                ),
                "writer": st.fixed_dictionaries(
                    {},
                    optional={
                        "name": st.sampled_from(["a:B", "a.b:C.D", "a", "1:2", "a:B\n", None]),
                        "arguments": st.sampled_from([{}, {"a": [None, {"b": 1.5}]}, [], None]),
                    },
                ),
                "objectStore": st.fixed_dictionaries({}, optional=OBJECT_STORE),
                "path": st.none(),
            },
        ),
        "retention": st.fixed_dictionaries(
            {},
            optional={
                "keepLast": counts,
                "keepEverySteps": counts,
                "keepBest": best,
                "maxAge": st.sampled_from(
                    ["30d", "36h", "1s", "0d", "07d", "7", "1w", "1h30m", "1000000s", "7d\n", 60, None]
                ),
                "maxBytes": amounts,
            },
        ),
        "restore": st.fixed_dictionaries({}, optional={"mode": words, "step": counts, "onMissing": words}),
        "drain": st.fixed_dictionaries({}, optional={"timeoutSeconds": counts}),
        "failurePolicy": words,
        "suspend": st.sampled_from([True, False, None, "true", 1]),
        "sidecar": st.fixed_dictionaries(
            {},
            optional={
                "resources": st.fixed_dictionaries(
                    {}, optional={"requests": lists_of_amounts, "limits": lists_of_amounts}
                ),
                "runAsUser": users,
                "runAsGroup": users,
                "env": st.lists(variables, max_size=3) | st.none(),
                "envFrom": st.lists(sources, max_size=2) | st.none(),
            },
        ),
    },
)
_GOOD_SPEC: Final[dict[str, Any]] = {
    "trigger": {"periodSteps": 10},
    "staging": {"sizeLimit": "1Gi"},
    "storage": {"persistentVolumeClaim": {"claimName": "a"}},
}


@settings(max_examples=200, deadline=None)
@given(specs, st.sets(st.sampled_from(sorted(SPEC["properties"])), max_size=2))
def test_what_the_schema_takes_the_model_takes(drawn: dict[str, Any], which: set[str]) -> None:
    """
    The API server stores no policy that the model then refuses; a policy without the drawn parts is good, so that each
    of them alone may decide.
    """
    document = _GOOD_SPEC | {key: each for key, each in drawn.items() if key in which}
    # A null for a field that the schema does not have is the one thing that only the API server takes amiss.
    document.get("storage", {}).pop("path", None)
    by_schema, by_model = judged(document)
    assert bool(by_schema) == bool(by_model), (by_schema, by_model)


@settings(max_examples=200, deadline=None)
@given(st.from_regex(SPEC["properties"]["staging"]["properties"]["sizeLimit"]["pattern"].replace("$", r"\Z")))
def test_each_amount_of_bytes_that_the_schema_takes_is_whole(text: str) -> None:
    """The schema's pattern is narrower than the model's, and takes nothing with a fraction of a byte."""
    if 0 < structural.quantity(text) < 2**60:
        assert policy.quantity_bytes(text) == structural.quantity(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_crd_is_what_its_tools_expect(name: str) -> None:
    """Names, version, status apart from spec, columns that exist, and conditions that are merged by type."""
    crd = structural.read(name)
    names = crd["spec"]["names"]
    assert crd["metadata"]["name"] == f"{name}.pillion.dev" == f"{names['plural']}.{crd['spec']['group']}"
    assert crd["spec"]["scope"] == "Namespaced"
    assert names["categories"] == ["checkpointing"]
    assert names["shortNames"] == {"checkpointpolicies": ["ckptpol"], "checkpoints": ["ckpt"]}[name]
    (version,) = crd["spec"]["versions"]
    assert f"{crd['spec']['group']}/{version['name']}" == policy.API_VERSION
    assert version["subresources"] == {"status": {}}
    schema = structural.schema_of(crd)
    paths = dict(structural.walk(schema))
    for column in version["additionalPrinterColumns"]:
        path = re.sub(r"\[(\?.*|0)\]", "[]", column["jsonPath"]).lstrip(".")
        assert path in paths or path.startswith("metadata."), column
    conditions = paths["status.conditions"]
    assert (conditions["x-kubernetes-list-type"], conditions["x-kubernetes-list-map-keys"]) == ("map", ["type"])


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_explained_in_a_sentence(name: str) -> None:
    """`kubectl explain` shows a sentence for each field, in ASCII."""
    for path, schema in structural.walk(structural.schema_of(structural.read(name))):
        if path == "metadata":
            continue
        description = schema.get("description", "")
        assert description.endswith("."), path
        assert description[0].isupper(), path
        assert description.isascii(), path


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_is_one_for_the_engine_of_the_api_server(name: str) -> None:
    """That engine (RE2) refuses a repetition of more than 1,000, and has no lookahead; a CRD with either is not accepted."""
    for path, schema in structural.walk(structural.schema_of(structural.read(name))):
        pattern = schema.get("pattern", "")
        assert all(int(each) <= 1000 for each in re.findall(r"\d+(?=[,}])", pattern)), path
        assert not re.search(r"\(\?[=!<]", pattern), path


def test_each_rule_has_its_mirror_and_each_mirror_its_rule() -> None:
    """The table of rules holds the very text of each CEL rule in the schemas, and nothing else."""
    found = {
        rule["rule"]
        for name in NAMES
        for _, schema in structural.walk(structural.schema_of(structural.read(name)))
        for rule in schema.get("x-kubernetes-validations", [])
    }
    assert found == structural.RULES.keys()


def test_the_id_of_a_job_fits_into_a_checkpoint() -> None:
    """Whatever id a pod gets, the Checkpoint that stands for its job can hold it."""
    schema = dict(structural.walk(structural.schema_of(structural.read("checkpoints"))))["spec.jobID"]
    pod_annotations, problems = annotations.parse({annotations.JOB_ID: "A" + "_" * 251 + "9"})
    job = identity.identify({"metadata": {"name": "a." * 126 + "a"}})
    assert problems == []
    assert isinstance(job, identity.Job)
    for job_id in (pod_annotations.job_id, job.id):
        assert structural.problems(schema, job_id) == []


def test_what_a_person_reads_of_a_broken_rule_stands_in_the_crd() -> None:
    """The cluster tests look for these texts in the answers of a real API server; here a change of a rule's text is noticed without one."""
    text = json.dumps(structural.read("checkpointpolicies"))
    assert EXPLAINED.keys() <= BAD.keys()
    assert [name for name, explained in EXPLAINED.items() if explained not in text] == []
