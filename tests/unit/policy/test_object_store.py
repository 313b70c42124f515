"""
The whole of: which object stores a policy may name, and what is said of one that it may not.

Called from: pytest. tests/unit/crds has the documents that schema and model judge alike.
"""

from typing import Any

import pytest

from pillion.wire import object_store, policy

EVERY_FIELD: dict[str, Any] = {
    "url": "s3://bucket/runs",
    "endpoint": "https://minio.example:9000",
    "region": "eu-central-1",
    "caBundle": {"configMap": "corp-ca", "key": "root.pem"},
    "credentials": {"secret": "s3-writer"},
    "encryption": {"kmsKeyId": "alias/checkpoints"},
    "requesterPays": True,
    "storageClass": "STANDARD_IA",
    "objectSize": "256Mi",
    "parallelism": 8,
    "bandwidthLimit": "2Gi",
    "checksum": "SHA256",
}


def parse(section: dict[str, Any], **storage: Any) -> policy.ObjectStore:
    read = policy.parse({"storage": {"objectStore": section, **storage}}, embedded=True).storage.object_store
    assert read is not None
    return read


def problem(section: dict[str, Any], **storage: Any) -> policy.PolicyProblem:
    """The one thing that is wrong with a section."""
    with pytest.raises(policy.PolicyError) as caught:
        parse(section, **storage)
    (only,) = caught.value.problems
    return only


def test_every_field_of_an_object_store_arrives() -> None:
    """Each field of the document arrives in its own place, and dumping gives the same document back."""
    read = policy.parse({"storage": {"objectStore": EVERY_FIELD}}, embedded=True)
    assert read.storage.object_store == policy.ObjectStore(
        url="s3://bucket/runs",
        endpoint="https://minio.example:9000",
        region="eu-central-1",
        ca_bundle=policy.CaBundle(config_map="corp-ca", key="root.pem"),
        credentials=policy.Credentials(secret="s3-writer"),
        encryption=policy.Encryption(kms_key_id="alias/checkpoints"),
        requester_pays=True,
        storage_class="STANDARD_IA",
        object_size_bytes=256 * 2**20,
        parallelism=8,
        bandwidth_limit_bytes=2 * 2**30,
        checksum=policy.Checksum.SHA256,
    )
    assert policy.dump(read)["storage"] == {"objectStore": EVERY_FIELD}


def test_a_url_is_all_that_a_cluster_needs() -> None:
    """Every other field has a default: the pod's identity, the cloud's address, 128 MiB and four requests."""
    spec = {"trigger": {"periodSteps": 1}, "staging": {"sizeLimit": "1Gi"}}
    read = policy.parse(spec | {"storage": {"objectStore": {"url": "s3://bucket"}}}, embedded=False)
    assert read.storage.object_store == policy.ObjectStore(
        url="s3://bucket", object_size_bytes=128 * 2**20, parallelism=4, checksum=policy.Checksum.AUTO
    )


def test_the_code_may_give_the_url() -> None:
    """A run without a cluster says how to write, and the code where; a cluster has nobody else to ask."""
    assert parse({"parallelism": 8}) == policy.ObjectStore(parallelism=8)
    spec = {"trigger": {"periodSteps": 1}, "staging": {"sizeLimit": "1Gi"}, "storage": {"objectStore": {}}}
    with pytest.raises(policy.PolicyError, match=r"storage\.objectStore\.url: got nothing"):
        policy.parse(spec, embedded=False)


def test_a_policy_without_an_object_store_is_written_as_before() -> None:
    """A sidecar of an older release refuses a field that it does not know, so that the absent section is not in the document."""
    claim = {"persistentVolumeClaim": {"claimName": "a"}}
    assert policy.dump(policy.parse({"storage": claim}, embedded=True))["storage"] == claim


@pytest.mark.parametrize("storage", [{"path": "runs"}, {"persistentVolumeClaim": {"claimName": "checkpoints"}}])
def test_an_object_store_is_the_only_backend(storage: dict[str, Any]) -> None:
    """Two backends leave open where the checkpoints are."""
    refused = problem({"url": "s3://bucket"}, **storage)
    assert refused.path == "storage"
    assert "objectStore" in refused.allowed


def test_a_writer_of_somebody_else_has_no_object_store() -> None:
    """Such a writer gets a directory, and its own arguments for anything else."""
    refused = problem({"url": "s3://bucket"}, writer={"name": "m:C"})
    assert (refused.path, refused.value) == ("storage.writer", "m:C")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket",
        "s3://bucket/",
        "s3://my.bucket-1/team=llm/runs_2/",
        "gs://bucket_of.ours/a",
        "az://container/a/b",
        "s3://bucket/..a/b...",
        "s3://bucket/" + "a" * 500,
    ],
)
def test_a_url_names_a_bucket_and_a_folder(url: str) -> None:
    """It stays as it is written."""
    assert parse({"url": url}).url == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "bucket", "/data", "s3:/bucket", "https://bucket.s3.amazonaws.com/a", "file:///a", "S3://bucket", 7),
        *("s3://", "s3:///a", "s3://ab", "s3://Bucket", "s3://-bucket", "az://con_tainer", "az://" + "a" * 64),
        *("s3://bucket?x=1", "s3://bucket/a#b", "s3://bucket/a//b", "s3://bucket/a b", "s3://bucket/a%2fb"),
        *("s3://bucket/..", "s3://bucket/./a", "s3://bucket/a/../b", "s3://bucket/a\n", "s3://bucket/$(A)"),
        *("s3://bucket/" + "a" * 501, "s3://bucket" + "/a" * 500_000, "s3://bucket/\u00e9"),
    ],
)
def test_what_is_no_such_url_is_refused_with_what_is(url: object) -> None:
    """The text has the three forms; and a long one is refused as fast as a short one."""
    refused = problem({"url": url})
    assert refused.path == "storage.objectStore.url"
    assert all(
        form in refused.allowed for form in ("s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix")
    )


@pytest.mark.parametrize("field", ["url", "endpoint"])
def test_credentials_in_a_url_are_refused_and_not_repeated(field: str) -> None:
    """The message goes to logs and conditions, which more people read than the policy's author thinks."""
    refused = problem({field: "s3://AKIA:pass/word@bucket"})
    assert refused.path == f"storage.objectStore.{field}"
    assert "AKIA" not in str(refused)
    assert "word" not in str(refused)
    assert "@bucket" in str(refused)


@pytest.mark.parametrize("scheme", ["gs", "az"])
@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("region", {"region": "eu-central-1"}),
        ("encryption.kmsKeyId", {"encryption": {"kmsKeyId": "a"}}),
        ("requesterPays", {"requesterPays": True}),
        ("credentials.awsRoleArn", {"credentials": {"awsRoleArn": "arn:aws:iam::123456789012:role/a"}}),
        ("checksum", {"checksum": "CRC64NVME"}),
    ],
)
def test_what_s3_alone_has_is_refused_elsewhere(scheme: str, name: str, section: dict[str, Any]) -> None:
    """A field that would be ignored is refused, with the scheme that it needs. With S3 it is accepted."""
    refused = problem({"url": f"{scheme}://bucket"} | section)
    assert refused.path == f"storage.objectStore.{name}"
    assert f"{scheme}://" in refused.allowed
    assert "s3://" in refused.allowed
    assert parse({"url": "s3://bucket"} | section).url == "s3://bucket"


def test_a_storage_class_is_of_s3_and_google() -> None:
    """Azure has tiers, which the client does not set."""
    assert parse({"url": "gs://bucket", "storageClass": "NEARLINE"}).storage_class == "NEARLINE"
    assert problem({"url": "az://bucket", "storageClass": "Hot"}).path == "storage.objectStore.storageClass"
    assert "gs://" in problem({"url": "az://bucket", "storageClass": "HOT"}).allowed


@pytest.mark.parametrize("name", object_store.UNREADABLE_CLASSES)
def test_a_checkpoint_that_cannot_be_read_is_not_written(name: str) -> None:
    """A restart cannot wait for hours until an archive has been restored."""
    assert "read at once" in problem({"url": "s3://bucket", "storageClass": name}).allowed


def test_what_needs_a_scheme_is_judged_by_the_root_of_the_code() -> None:
    """A section without a URL cannot be judged before the root is known; then it is, by the same rules."""
    section = parse({"region": "eu-central-1"})
    assert list(object_store.misfits(section, "s3://bucket")) == []
    (broken,) = object_store.misfits(section, "gs://bucket")
    assert broken.name == "region"


@pytest.mark.parametrize("credentials", [{}, {"secret": "a", "awsRoleArn": "arn:aws:iam::123456789012:role/a"}])
def test_credentials_are_exactly_one(credentials: dict[str, Any]) -> None:
    """None of the two, or both, leaves open who writes; without the section it is the pod."""
    refused = problem({"credentials": credentials})
    assert refused.path == "storage.objectStore.credentials"
    assert "the pod's own identity" in refused.allowed


@pytest.mark.parametrize("arn", ["", "admin", "arn:aws:iam::123456789012:user/a", "arn:aws:iam::123456789012:role/", 5])
def test_a_role_is_an_arn(arn: object) -> None:
    """A name alone, or the ARN of a user, is no role that a token can be exchanged for."""
    assert problem({"credentials": {"awsRoleArn": arn}}).path == "storage.objectStore.credentials.awsRoleArn"


@pytest.mark.parametrize("name", object_store.AWS_CREDENTIALS)
def test_a_role_and_a_variable_that_wins_over_it_are_refused(name: str) -> None:
    """A key in the environment takes precedence, and the role would be without effect, silently."""
    role = {"credentials": {"awsRoleArn": "arn:aws:iam::123456789012:role/a"}}
    document = {
        "storage": {"objectStore": role},
        "sidecar": {"env": [{"name": "A", "value": "1"}, {"name": name, "value": "x"}]},
    }
    with pytest.raises(policy.PolicyError) as caught:
        policy.parse(document, embedded=True)
    assert [each.path for each in caught.value.problems] == ["sidecar.env[1].name"]
    # Without a role these are credentials like any other.
    policy.parse(document | {"storage": {"objectStore": {}}}, embedded=True)


@pytest.mark.parametrize(("size", "span"), [("8191Ki", "8Mi"), (2**30 + 1, "1Gi"), ("lots", "8Mi"), (0, "8Mi")])
def test_an_object_has_a_size_within_bounds(size: object, span: str) -> None:
    """Smaller ones cost a request each; a larger one is sent again as a whole. The text has both bounds."""
    refused = problem({"objectSize": size})
    assert refused.path == "storage.objectStore.objectSize"
    assert span in refused.allowed


def test_a_bandwidth_in_thousandths_is_a_slip() -> None:
    """100m is a tenth of a byte in the notation of Kubernetes, and 2 is two bytes."""
    for value in ("100m", 2, "1023Ki"):
        assert "at least 1Mi" in problem({"bandwidthLimit": value}).allowed
    assert parse({"bandwidthLimit": "1Mi"}).bandwidth_limit_bytes == 2**20


@pytest.mark.parametrize("key", ["..", ".", "a/b", ""])
def test_a_key_of_certificates_is_a_file(key: str) -> None:
    """The key becomes the name of a file in the sidecar."""
    assert problem({"caBundle": {"configMap": "a", "key": key}}).path == "storage.objectStore.caBundle.key"
