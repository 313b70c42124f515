"""
The section `storage.objectStore` of a policy: a bucket, how to reach it, and how objects are laid into it.

Producer: the user, in a policy. Consumer: `policy`, which reads the section; the injector, which makes a root of the URL; the sidecar,
which opens the store.

Breaking changes: those of `policy`. Non-breaking changes: another scheme, another character in a prefix, a wider range.

Must never: open a store, read a clock, a file or the environment, or import anything outside the standard library.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pillion.wire.policy_document import Broken, Section, text_rule
from pillion.wire.quantities import BYTES

Checksum = StrEnum("Checksum", {"AUTO": "Auto", "CRC64NVME": "CRC64NVME", "SHA256": "SHA256", "NONE": "None"})
"""Checksum that each upload carries and the store verifies: CRC64NVME where the store is AWS itself, a fixed one, or none."""

_BUCKET: Final = (
    r"(s3://[a-z0-9][-_.a-z0-9]{1,61}|gs://[a-z0-9][-_.a-z0-9]{1,220}|az://[a-z0-9][-a-z0-9]{1,61})[a-z0-9]"
)
"""Scheme and bucket, with the lengths and characters that each of the three clouds allows."""
_SEGMENT: Final = r"(?!\.{1,2}(/|$))[-_.=A-Za-z0-9]+"
"""A folder in a bucket. Other characters are written in several ways in a URL, and the tools that read a checkpoint differ in them."""
_MAX_URL: Final = 512
"""Maximum characters of a URL. A key of S3 has at most 1,024 bytes, and a namespace, a job, a step and a file are appended to it."""
_LEAST_OBJECT_BYTES: Final = 8 * 2**20
"""Least size of an object. Each object costs a request, so that smaller ones make a large checkpoint slow and expensive."""
_MOST_OBJECT_BYTES: Final = 2**30
"""Largest size of an object. An object is sent in one request, which a failure repeats from its beginning."""
_LEAST_BANDWIDTH: Final = 2**20
"""Least bandwidth, in bytes a second. A lower one is a slip, such as 100m for 100Mi."""
UNREADABLE_CLASSES: Final = ("GLACIER", "DEEP_ARCHIVE")
"""Storage classes of S3 whose objects cannot be read before they are restored, which takes minutes to days."""
ENV_AWS_ROLE_ARN: Final = "AWS_ROLE_ARN"
ENV_AWS_TOKEN_FILE: Final = "AWS_WEB_IDENTITY_TOKEN_FILE"
AWS_CREDENTIALS: Final = (ENV_AWS_ROLE_ARN, ENV_AWS_TOKEN_FILE, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
"""Variables that select credentials of AWS. A key in the environment takes precedence over a role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaBundle(Section):
    """Certificates that are trusted for the store, beside those of the sidecar's image. A run without a cluster sets `PILLION_STORAGE_CA` instead."""

    config_map: str = field(
        metadata=text_rule("the name of a ConfigMap of the namespace", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
    )
    """The ConfigMap, in the namespace of the pod."""
    key: str = field(default="ca.crt", metadata=text_rule("a key of a ConfigMap", r"(?!\.{1,2}$)[-._a-zA-Z0-9]{1,253}"))
    """The key with the certificates, in PEM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials(Section):
    """Credentials of the sidecar alone: exactly one of the two. A run without a cluster takes them from the environment instead."""

    secret: str | None = field(
        default=None,
        metadata=text_rule("the name of a Secret of the namespace", r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"),
    )
    """A Secret in the namespace of the pod. Its keys become variables of the sidecar, such as ``AWS_ACCESS_KEY_ID``."""
    aws_role_arn: str | None = field(
        default=None,
        metadata=text_rule(
            "the ARN of a role, such as arn:aws:iam::123456789012:role/checkpoints",
            r"arn:[-a-z0-9]{1,32}:iam::[0-9]{0,12}:role/[-_+=,.@/a-zA-Z0-9]{1,512}",
        ),
    )
    """A role of AWS, which the sidecar assumes with a service account token of its own."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if (self.secret is None) == (self.aws_role_arn is None):
            allowed = "exactly one of secret and awsRoleArn; without credentials, the pod's own identity is used"
            yield Broken(("secret", "aws_role_arn"), "", None, allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption(Section):
    """Encryption by the store with a key of its key service (SSE-KMS)."""

    kms_key_id: str = field(metadata=text_rule("the id, alias or ARN of a KMS key", r"[-_.:/a-zA-Z0-9]{1,2048}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStore(Section):
    """A bucket of S3, of a store that has its API, of Google Cloud Storage, or a container of Azure Blob Storage."""

    url: str | None = field(
        default=None,
        metadata=text_rule(
            "s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, of lower-case letters, digits and -_. in the bucket, and"
            f" letters, digits and -_.= in the prefix; at most {_MAX_URL} characters; no credentials, query or empty folder",
            rf"(?=.{{1,{_MAX_URL}}}$){_BUCKET}(/{_SEGMENT})*/?",
        ),
    )
    """Bucket and folder of all jobs' checkpoints. Required in a cluster; without one the code gives the root, and this has no effect."""
    endpoint: str | None = field(
        default=None,
        metadata=text_rule(
            f"an http:// or https:// URL of at most {_MAX_URL} characters, without credentials or query",
            rf"(?=.{{1,{_MAX_URL}}}$)https?://([-.a-zA-Z0-9]{{1,253}}|\[[0-9a-fA-F:.]{{2,45}}\])(:[0-9]{{1,5}})?(/[-_.~A-Za-z0-9]+)*/?",
        ),
    )
    """Address of the store. With ``s3://``, the bucket is then part of the path. None: the cloud's own."""
    region: str | None = field(
        default=None, metadata=text_rule("a region, such as eu-central-1", r"[-_a-zA-Z0-9]{1,64}")
    )
    """Region of an S3 bucket. None: that of the environment, else us-east-1."""
    ca_bundle: CaBundle | None = None
    """None: the certificates of the sidecar's image alone."""
    credentials: Credentials | None = None
    """None: the pod's own identity, which its trainer has as well. In a run without a cluster: the environment's."""
    encryption: Encryption | None = None
    """None: as the bucket sets it."""
    requester_pays: bool = False
    """Whether requests are charged to the account that sends them."""
    storage_class: str | None = field(
        default=None, metadata=text_rule("a storage class, such as STANDARD", r"[A-Z][_A-Z0-9]{0,63}")
    )
    """Storage class of the objects. None: the bucket's."""
    object_size_bytes: int = field(
        default=128 * 2**20,
        metadata={"name": "objectSize", "unit": BYTES, "least": _LEAST_OBJECT_BYTES, "most": _MOST_OBJECT_BYTES},
    )
    """Maximum bytes of an object that holds several items; ``objectSize``, a quantity, in the document."""
    parallelism: int = field(default=4, metadata={"most": 64})
    """Requests in flight for each pod. Four at first: a thousand pods then send four thousand, about what one prefix of S3 takes."""
    bandwidth_limit_bytes: int | None = field(
        default=None, metadata={"name": "bandwidthLimit", "unit": BYTES, "least": _LEAST_BANDWIDTH}
    )
    """Maximum bytes that each pod uploads in a second; ``bandwidthLimit``, a quantity, in the document. None: no limit."""
    checksum: Checksum = Checksum.AUTO
    """Auto by default: stores that only resemble S3 refuse a checksum, or save it in the object. Pillion verifies its own at each load."""

    def broken(self, embedded: bool) -> Iterator[Broken]:
        if not embedded and self.url is None:
            yield Broken(("url",), "url", None, "the URL of a bucket in a cluster, such as s3://bucket/prefix")
        if self.url is not None:
            yield from misfits(self, self.url)
        if self.storage_class in UNREADABLE_CLASSES:
            allowed = "a storage class whose objects can be read at once"
            yield Broken(("storage_class",), "storageClass", self.storage_class, allowed)


def misfits(store: ObjectStore, url: str) -> Iterator[Broken]:
    """
    Yield the fields of a section that the store of a URL does not have.

    Args:
        store: the section.
        url: the section's own URL; or the root that the code gives, for a section without one.
    """
    scheme = url.partition("://")[0]
    role = store.credentials.aws_role_arn if store.credentials else None
    key = store.encryption.kms_key_id if store.encryption else None
    checksum = store.checksum.value if store.checksum in (Checksum.CRC64NVME, Checksum.SHA256) else None
    for attribute, name, value, schemes in (
        ("region", "region", store.region, ("s3",)),
        ("credentials", "credentials.awsRoleArn", role, ("s3",)),
        ("encryption", "encryption.kmsKeyId", key, ("s3",)),
        ("requester_pays", "requesterPays", store.requester_pays or None, ("s3",)),
        ("checksum", "checksum", checksum, ("s3",)),
        ("storage_class", "storageClass", store.storage_class, ("s3", "gs")),
    ):
        if value is not None and scheme not in schemes:
            wanted = " or ".join(f"{each}://" for each in schemes)
            yield Broken(("url", attribute), name, value, f"nothing with {scheme}://, as {name} needs {wanted}")
