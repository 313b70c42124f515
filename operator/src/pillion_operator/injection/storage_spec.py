"""
The whole of: what the storage of a policy adds to a pod: the root of the job's checkpoints, and volumes, mounts and variables of the
sidecar. A claim is a volume that is mounted. An object store is a URL; its credentials and certificates are the sidecar's.

Called from: `sidecar_spec`.
Must never: put credentials of a storage into another container, or into the value of a variable.
"""

from typing import Final

from pillion.wire import names, object_store, policy
from pillion_operator.injection import entries
from pillion_operator.injection.pods import Json

VOLUME: Final = "pillion-storage"
CA_VOLUME: Final = "pillion-storage-ca"
TOKEN_VOLUME: Final = "pillion-storage-token"
LOCAL_VOLUME: Final = "pillion-local"
VOLUMES: Final = (VOLUME, CA_VOLUME, TOKEN_VOLUME, LOCAL_VOLUME)

DIR: Final = "/pillion/storage"
LOCAL_DIR: Final = "/pillion/local"
CA_DIR: Final = "/pillion/storage-ca"
CA_FILE: Final = "ca.crt"
TOKEN_DIR: Final = "/pillion/storage-token"
TOKEN_FILE: Final = "token"

AWS_AUDIENCE: Final = "sts.amazonaws.com"
"""Audience of the token that AWS exchanges for credentials. Source: EKS documentation, "IAM roles for service accounts"."""
AWS_TOKEN_S: Final = 3600
"""Lifetime of that token in seconds. The sidecar reads the file again for each exchange, so that an hour is long enough."""


def needs_namespace(storage: policy.Storage) -> bool:
    """Whether the root has the namespace of the pod in it. Namespaces share a bucket; a claim is in one of them."""
    return storage.object_store is not None


def root(storage: policy.Storage, namespace: str, job_id: str) -> str:
    """The folder of a job's checkpoints, as the sidecar sees it: a directory in the claim's mount, or a URL."""
    if storage.object_store is None:
        return f"{DIR}/{job_id}"
    assert namespace, "a pod without a namespace was refused"
    return "/".join((_url(storage.object_store).rstrip("/"), namespace, job_id))


def volumes(storage: policy.Storage) -> list[Json]:
    """The volumes of a storage."""
    store = storage.object_store
    result = [_local_volume(storage.local)] if storage.local is not None else []
    if store is None:
        return [{"name": VOLUME, "persistentVolumeClaim": {"claimName": _claim(storage).claim_name}}, *result]
    if store.ca_bundle is not None:
        items = [{"key": store.ca_bundle.key, "path": CA_FILE}]
        certificates = {"name": store.ca_bundle.config_map, "defaultMode": 0o644, "items": items}
        result.append({"name": CA_VOLUME, "configMap": certificates})
    if _role(store):
        result.append(entries.token_volume(TOKEN_VOLUME, AWS_AUDIENCE, AWS_TOKEN_S, TOKEN_FILE))
    return result


def mounts(storage: policy.Storage) -> list[Json]:
    """The mounts of a storage in the sidecar."""
    store = storage.object_store
    local = [entries.mount(LOCAL_VOLUME, LOCAL_DIR)] if storage.local is not None else []
    if store is None:
        sub_path = _claim(storage).sub_path
        return [entries.mount(VOLUME, DIR) | ({"subPath": sub_path} if sub_path else {}), *local]
    certificates = [entries.mount(CA_VOLUME, CA_DIR, is_read_only=True)] if store.ca_bundle else []
    return local + certificates + ([entries.mount(TOKEN_VOLUME, TOKEN_DIR, is_read_only=True)] if _role(store) else [])


def environment(storage: policy.Storage) -> list[Json]:
    """The variables of a storage in the sidecar, besides the root."""
    store = storage.object_store
    local = [entries.literal(names.ENV_LOCAL_DIR, LOCAL_DIR)] if storage.local is not None else []
    if store is None:
        return local
    env = local + ([entries.literal(names.ENV_STORAGE_CA, f"{CA_DIR}/{CA_FILE}")] if store.ca_bundle else [])
    if role := _role(store):
        env += [
            entries.literal(object_store.ENV_AWS_ROLE_ARN, role),
            entries.literal(object_store.ENV_AWS_TOKEN_FILE, f"{TOKEN_DIR}/{TOKEN_FILE}"),
        ]
    return env


def env_from(storage: policy.Storage) -> list[Json]:
    """The sources of variables of a storage in the sidecar."""
    store = storage.object_store
    secret = store.credentials.secret if store and store.credentials else None
    return [{"secretRef": {"name": secret}}] if secret else []


def disk_bytes(storage: policy.Storage) -> int:
    """What a storage may take of the disk that Kubernetes counts for the pod, bytes. 0: nothing, or no limit is set."""
    local = storage.local.empty_dir if storage.local is not None else None
    return (local.size_limit_bytes or 0) if local is not None else 0


def _local_volume(local: policy.Local) -> Json:
    if local.host_path is not None:
        # "Directory": a disk that is not mounted is then an error of the pod, and not a full root disk of the node.
        return {"name": LOCAL_VOLUME, "hostPath": {"path": local.host_path.path, "type": "Directory"}}
    size_bytes = local.empty_dir.size_limit_bytes if local.empty_dir is not None else None
    limit = {} if size_bytes is None else {"sizeLimit": policy.format_bytes(size_bytes)}
    return {"name": LOCAL_VOLUME, "emptyDir": limit}


def _url(store: policy.ObjectStore) -> str:
    assert store.url is not None, "the policy's reader requires a URL in a cluster"
    return store.url


def _role(store: policy.ObjectStore) -> str:
    return (store.credentials.aws_role_arn if store.credentials else None) or ""


def _claim(storage: policy.Storage) -> policy.VolumeClaim:
    claim = storage.persistent_volume_claim
    assert claim is not None, "the policy's reader requires a claim or an object store in a cluster"
    return claim
