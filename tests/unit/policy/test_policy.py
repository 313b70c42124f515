"""
The whole of: which policy documents are valid, and how problems are reported.

Called from: pytest.
Must never: compare whole messages; only the path, the value and what a reader needs from the words.
"""

import copy
import dataclasses

import pytest

from pillion.wire import policy, policy_document, quantities

IN_A_CLUSTER: dict[str, object] = {
    "trigger": {"periodSteps": 200, "periodSeconds": 600, "snapshotSteps": 10, "onTermination": "Save"},
    "staging": {"sizeLimit": "96Gi", "slots": 2, "overlap": "Wait", "memoryAccounting": "Sidecar"},
    "store": "Prefix",
    "storage": {"persistentVolumeClaim": {"claimName": "checkpoints", "subPath": "runs"}},
    "retention": {"keepLast": 3, "keepEverySteps": 5000},
    "restore": {"mode": "Latest", "onMissing": "Fresh"},
    "drain": {"timeoutSeconds": 300},
    "failurePolicy": "Fail",
    "suspend": False,
    "sidecar": {"resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}}},
}
"""A policy with every field."""


def problems(document: object, *, embedded: bool = True) -> dict[str, policy.PolicyProblem]:
    """What is wrong with a document, by path."""
    with pytest.raises(policy.PolicyError) as caught:
        policy.parse(document, embedded=embedded)  # type: ignore[arg-type]
    by_path = {each.path: each for each in caught.value.problems}
    assert len(by_path) == len(caught.value.problems)
    assert all(str(each) in str(caught.value) for each in caught.value.problems)
    return by_path


def test_the_policy_of_the_design_is_read_whole() -> None:
    """Each field of the document arrives in its own place, and dumping gives the same document back."""
    read = policy.parse(IN_A_CLUSTER, embedded=False)
    assert read == policy.Policy(
        trigger=policy.Trigger(period_steps=200, period_seconds=600, snapshot_steps=10),
        staging=policy.Staging(size_limit_bytes=96 * 2**30),
        storage=policy.Storage(
            persistent_volume_claim=policy.VolumeClaim(claim_name="checkpoints", sub_path="runs"),
        ),
        retention=policy.Retention(keep_last=3, keep_every_steps=5000),
    )
    assert policy.dump(read) == IN_A_CLUSTER


def test_an_empty_document_is_a_policy_without_a_cluster() -> None:
    """A run without a cluster needs no document at all: every field has a default."""
    assert policy.parse({}, embedded=True) == policy.Policy()


def test_an_empty_document_is_no_policy_in_a_cluster() -> None:
    """A cluster requires a period, a storage and the arena's size. All three are reported at once."""
    assert set(problems({}, embedded=False)) == {"trigger", "staging.sizeLimit", "storage"}


def test_the_workload_may_pay_for_an_arena_without_a_limit() -> None:
    """Where the sidecar adds no memory request, the pod's own limit bounds the arena."""
    document = copy.deepcopy(IN_A_CLUSTER) | {"staging": {"memoryAccounting": "Workload"}}
    assert policy.parse(document, embedded=False).staging.size_limit_bytes is None


def test_a_whole_object_is_read_and_its_kind_checked() -> None:
    """The object as kubectl prints it is a document too; its metadata and status are no business of ours."""
    whole = {"apiVersion": policy.API_VERSION, "kind": policy.KIND, "metadata": {"name": "llm"}, "status": {"x": 1}}
    assert policy.parse(whole | {"spec": IN_A_CLUSTER}, embedded=False) == policy.parse(IN_A_CLUSTER, embedded=False)
    refused = problems(whole | {"apiVersion": "v1", "kind": "Pod", "spek": {}, "spec": {"store": "Mine"}})
    assert set(refused) == {"apiVersion", "kind", "spek", "spec.store"}
    assert refused["apiVersion"].allowed == policy.API_VERSION
    assert refused["spek"].meant == "spec"


def test_a_null_is_an_absent_field() -> None:
    """An empty YAML value takes the default, as it does in the API server."""
    assert policy.parse({"trigger": None, "retention": {"keepLast": None}}, embedded=True) == policy.Policy()


def test_every_problem_is_reported_at_once() -> None:
    """One look at the message is enough to put the whole document right."""
    refused = problems(
        {
            "trigger": {"periodSteps": 0, "onTermination": "save"},
            "staging": {"sizeLimit": "lots", "slots": 1, "overlap": "Latests"},
            "drain": {"timeoutSeconds": "300"},
            "retention": 3,
            "suspend": "no",
        }
    )
    assert set(refused) == {
        "trigger.periodSteps",
        "trigger.onTermination",
        "staging.sizeLimit",
        "staging.slots",
        "staging.overlap",
        "drain.timeoutSeconds",
        "retention",
        "suspend",
    }
    assert refused["staging.overlap"].value == "Latests"
    assert refused["staging.overlap"].allowed == "one of Wait, Skip, Latest"


@pytest.mark.parametrize("value", [True, False, -1, 0, 2**63, 1.0, "5", [5], {}])
def test_a_period_is_a_positive_whole_number(value: object) -> None:
    """Booleans, numbers below one, above an int64 or with a point, and strings are no number of steps."""
    assert problems({"trigger": {"periodSteps": value}})["trigger.periodSteps"].value == value


@pytest.mark.parametrize(
    ("written", "meant"),
    [("period_steps", "periodSteps"), ("periodStep", "periodSteps"), ("PeriodSeconds", "periodSeconds")],
)
def test_an_unknown_field_names_the_nearest_known_one(written: str, meant: str) -> None:
    """A typo in a field's name leads to the right name. The missing period is then not reported as well."""
    document = copy.deepcopy(IN_A_CLUSTER) | {"trigger": {written: 5}}
    refused = problems(document, embedded=False)
    assert set(refused) == {f"trigger.{written}"}
    assert refused[f"trigger.{written}"].meant == f"trigger.{meant}"


@pytest.mark.parametrize(
    ("document", "meant"),
    [
        ({"periodSteps": 5}, "trigger.periodSteps"),
        ({"snapshot_step": 5}, "trigger.snapshotSteps"),
        ({"keepLast": 5}, "retention.keepLast"),
        ({"trigger": {"keepLast": 5}}, "retention.keepLast"),
        ({"trigger": {"storage": {}}}, "storage"),
        ({"url": "s3://bucket"}, "storage.objectStore.url"),
        ({"path": "runs"}, "storage.path"),
        ({"apiVersion": policy.API_VERSION, "kind": policy.KIND, "spec": {"step": 5}}, "spec.restore.step"),
        ({"apiVersion": policy.API_VERSION, "kind": policy.KIND, "spec": {}, "trigger": {}}, "spec.trigger"),
    ],
)
def test_a_field_at_a_wrong_level_names_its_place(document: dict[str, object], meant: str) -> None:
    """A flat policy is a likely mistake. A name of several places leads to the highest one."""
    (problem,) = problems(document).values()
    assert problem.meant == meant


def test_a_period_beside_its_section_is_not_reported_as_missing_too() -> None:
    """One mistake is one problem: the section that the period was meant for lacks nothing else."""
    document = {key: value for key, value in IN_A_CLUSTER.items() if key != "trigger"} | {"periodSteps": 5}
    assert set(problems(document, embedded=False)) == {"periodSteps"}


def test_the_text_of_an_unknown_field_says_what_was_meant_apart_from_what_is_allowed() -> None:
    """The field, its value, the guess and the fields that there are."""
    assert str(problems({"trigger": {"keepLast": 5}})["trigger.keepLast"]) == (
        "trigger.keepLast: got 5; unknown field (did you mean retention.keepLast?); allowed: the fields"
        " periodSteps, periodSeconds, auto, snapshotSteps, localSteps, onTermination"
    )
    assert str(problems({"store": "Mine"})["store"]) == "store: got 'Mine'; allowed: one of Prefix, Own"


def test_an_unknown_field_like_no_other_lists_the_known_ones() -> None:
    """Where nothing is near, no guess is made."""
    problem = problems({"xyzzy": 1})["xyzzy"]
    assert problem.meant is None
    assert "failurePolicy" in problem.allowed
    assert "unknown field; allowed: the fields trigger" in str(problem)


def test_a_snapshot_period_is_shorter_than_the_persist_period() -> None:
    """A snapshot period that is not shorter would do nothing, or not what was meant."""
    refused = problems({"trigger": {"periodSteps": 10, "snapshotSteps": 10}})
    assert "less than periodSteps, which is 10" in refused["trigger.snapshotSteps"].allowed


def test_two_backends_are_one_too_many() -> None:
    """A path and a claim together leave open where the checkpoints are."""
    both = {"path": "runs", "persistentVolumeClaim": {"claimName": "checkpoints"}}
    assert set(problems({"storage": both})) == {"storage"}


def test_a_path_is_no_backend_in_a_cluster_and_a_claim_needs_no_cluster_to_be_read() -> None:
    """A path in a pod ends with the pod; the document of a cluster can be used as it is without one."""
    document = copy.deepcopy(IN_A_CLUSTER) | {"storage": {"path": "/data"}}
    assert set(problems(document, embedded=False)) == {"storage.path"}
    assert policy.parse(document, embedded=True).storage.path == "/data"
    assert policy.parse(IN_A_CLUSTER, embedded=True) == policy.parse(IN_A_CLUSTER, embedded=False)


@pytest.mark.parametrize("path", ["", "  ", "s3://bucket/runs", "a\0b", 7])
def test_a_path_is_a_directory_and_no_address(path: object) -> None:
    """An address of an object store would be taken for a directory with a strange name."""
    assert set(problems({"storage": {"path": path}})) == {"storage.path"}


@pytest.mark.parametrize("sub_path", ["/runs", "..", "../other", "a/../b", "a/..", ""])
def test_a_sub_path_stays_in_its_volume(sub_path: str) -> None:
    """An absolute directory and one that climbs are refused before the container is."""
    storage = {"persistentVolumeClaim": {"claimName": "checkpoints", "subPath": sub_path}}
    assert set(problems({"storage": storage})) == {"storage.persistentVolumeClaim.subPath"}


def test_a_claim_has_a_name() -> None:
    """An absent required field is reported, and one with a wrong value is reported once."""
    at = "storage.persistentVolumeClaim.claimName"
    assert problems({"storage": {"persistentVolumeClaim": {}}})[at].value is None
    assert problems({"storage": {"persistentVolumeClaim": {"claimName": "No_Name"}}})[at].value == "No_Name"


def test_a_writer_is_named_by_import_path_with_json_arguments() -> None:
    """A writer goes with a path, and its arguments are a copy that the document's owner cannot change afterwards."""
    arguments = {"threads": 4, "nested": {"list": [1, None, "x"]}}
    document = {"storage": {"path": "runs", "writer": {"name": "my.module:Outer.Writer", "arguments": arguments}}}
    read = policy.parse(document, embedded=True)
    arguments["nested"]["list"].append("late")  # type: ignore[index]
    assert read.storage.writer == policy.Writer(
        name="my.module:Outer.Writer", arguments={"threads": 4, "nested": {"list": [1, None, "x"]}}
    )
    assert isinstance(hash(read), int)


@pytest.mark.parametrize("name", ["module", "module.Class", ":Class", "module:", "a b:C", "1a:C", "a..b:C", 3])
def test_a_writer_without_module_and_class_is_refused(name: object) -> None:
    """Only module:Class can be imported."""
    assert set(problems({"storage": {"writer": {"name": name}}})) == {"storage.writer.name"}


def test_arguments_that_are_no_json_are_refused_where_they_stand() -> None:
    """A policy travels as JSON, so its arguments are JSON."""
    arguments = {"a": float("nan"), "b": [1, object()], "c": {3: 4}}
    refused = problems({"storage": {"writer": {"name": "m:C", "arguments": arguments}}})
    at = "storage.writer.arguments"
    assert set(refused) == {f"{at}.a", f"{at}.b[1]", f"{at}.c"}


def test_arguments_of_a_writer_are_bounded_and_the_bound_is_told_once() -> None:
    """Each pod carries them; a document of half a megabyte of brackets took seconds to read."""
    allowed = policy_document.MAX_VALUES - 2
    most: dict[str, object] = {"storage": {"path": "a", "writer": {"name": "m:C", "arguments": {"a": [0] * allowed}}}}
    assert policy.parse(most, embedded=True).storage.writer is not None
    (refused,) = problems({"storage": {"writer": {"name": "m:C", "arguments": {"a": [0] * (allowed + 9)}}}}).values()
    assert refused.allowed == f"at most {policy_document.MAX_VALUES} values"


def test_what_stays_for_good_needs_a_limit_on_what_stays_else() -> None:
    """Without keepLast nothing is removed, so keepEverySteps alone has no meaning."""
    assert set(problems({"retention": {"keepEverySteps": 100}})) == {"retention.keepLast"}


@pytest.mark.parametrize("restore", [{"mode": "Step"}, {"step": 5}, {"mode": "None", "step": 5}])
def test_a_step_to_load_goes_with_the_mode_step_only(restore: dict[str, object]) -> None:
    """A step that would be ignored, and a mode that lacks one, are both refused."""
    assert set(problems({"restore": restore})) == {"restore.step"}
    assert policy.parse({"restore": {"mode": "Step", "step": 0}}, embedded=True).restore.step == 0


def test_requests_fit_in_limits() -> None:
    """What Kubernetes would refuse in the pod is refused in the policy."""
    resources = {"requests": {"cpu": "1500m", "memory": "2Gi"}, "limits": {"cpu": 1, "memory": "2Gi"}}
    refused = problems({"sidecar": {"resources": resources}})
    assert set(refused) == {"sidecar.resources.requests.cpu"}
    assert refused["sidecar.resources.requests.cpu"].value == "1500m"


def test_given_resources_replace_the_default_as_a_whole() -> None:
    """A user who sets a limit gets no request of ours that it could not hold."""
    read = policy.parse({"sidecar": {"resources": {"limits": {"memory": "256Mi"}}}}, embedded=True)
    assert read.sidecar.resources.requests == policy.ResourceList()
    assert policy.parse(policy.dump(read), embedded=True) == read


def test_a_policy_made_by_hand_is_checked_by_dump_and_parse() -> None:
    """Keyword arguments are a document too, and pass the same test."""
    made = policy.Policy(drain=policy.Drain(timeout_seconds=-1))
    assert set(problems(policy.dump(made))) == {"drain.timeoutSeconds"}


def test_a_long_value_is_clipped_in_the_message() -> None:
    """A value of a million characters does not end up in a log."""
    assert len(str(problems({"store": "x" * 1_000_000})["store"])) < 200


def test_nothing_in_a_policy_can_be_set() -> None:
    """A policy that was checked stays as it was checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.Policy().suspend = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("quantity", "num_bytes"),
    [
        ("96Gi", 96 * 2**30),
        ("1.5G", 1_500_000_000),
        ("1.5Ki", 1536),
        (1073741824, 2**30),
        ("1073741824", 2**30),
        ("1e9", 10**9),
        ("1E3", 1000),
        ("1E", 10**18),
        ("2000m", 2),
        ("+5.", 5),
        (".5k", 500),
        ("0", 0),
        ("0.1M", 100_000),
    ],
)
def test_a_quantity_is_read_exactly(quantity: str | int, num_bytes: int) -> None:
    """Each spelling that Kubernetes knows means the bytes that it means there."""
    assert policy.quantity_bytes(quantity) == num_bytes


@pytest.mark.parametrize(
    "quantity",
    ["", "1.5", "100m", "0.1Ki", "-1", "1 Gi", "1GiB", "1gi", "1K", "Gi", ".", "1e", "1e99", "8Ei", "9" * 40, "1_000"],
)
def test_what_is_no_whole_number_of_bytes_is_refused(quantity: str) -> None:
    """No quantity is rounded, and none is larger than what the API server can hold."""
    with pytest.raises(ValueError, match="whole number of bytes"):
        policy.quantity_bytes(quantity)


@pytest.mark.parametrize("value", [True, 1.5, None, -1, 2**63])
def test_what_is_no_quantity_at_all_is_refused(value: object) -> None:
    """A quantity is a string or a whole number that is not negative."""
    with pytest.raises(ValueError):
        policy.quantity_bytes(value)  # type: ignore[arg-type]


def test_a_size_of_nothing_is_no_size() -> None:
    """Zero bytes of arena or of memory is a slip, not a wish."""
    assert set(problems({"staging": {"sizeLimit": 0}})) == {"staging.sizeLimit"}


@pytest.mark.parametrize(
    ("num_bytes", "quantity"),
    [
        (0, "0"),
        (1, "1"),
        (1024, "1Ki"),
        (1536, "1536"),
        (1_500_000_000, "1500M"),
        (3 * 2**29, "1536Mi"),
        (2**60, "1Ei"),
    ],
)
def test_bytes_are_written_with_the_largest_suffix_that_divides(num_bytes: int, quantity: str) -> None:
    """What is written is short where it can be, and exact always."""
    assert policy.format_bytes(num_bytes) == quantity


@pytest.mark.parametrize(("text", "seconds"), [("1s", 1), ("90m", 5400), ("36h", 129_600), ("30d", 2_592_000)])
def test_a_duration_is_a_whole_number_with_a_unit(text: str, seconds: int) -> None:
    """It is written back with the largest unit that divides it."""
    assert policy.duration_seconds(text) == seconds
    assert policy.duration_seconds(quantities.format_duration(seconds)) == seconds
    assert quantities.format_duration(86_400) == "1d"


@pytest.mark.parametrize("value", ["0d", "07d", "1w", "1h30m", "30", 30, "-1d", "1000000s", "1d\n", "", None, True])
def test_anything_else_is_no_duration(value: object) -> None:
    """No number without a unit, which somebody could take for days."""
    with pytest.raises(ValueError, match="is not a whole number from 1 to 999999 with the unit s, m, h or d"):
        policy.duration_seconds(value)
