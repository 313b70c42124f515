"""
The sidecar's settings: one frozen value, read from flags and environment variables in one place.

Called from: `__main__`. A flag takes precedence over its environment variable, and the variable over the default. The timeouts that a
deployment may have to change are here, each with its unit and its reason. All problems are reported together.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import yaml

from pillion.errors import SettingsError
from pillion.wire import names, policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """
    The settings of one sidecar.

    Metadata of a field: ``env``, its variable; ``text``, its meaning, for `run --help` and docs/reference/settings.md; ``unit`` of a
    quantity; ``least``, the minimum of a whole number, if it is not 1.
    """

    runtime_dir: str = field(
        metadata={
            "env": names.ENV_RUNTIME_DIR,
            "text": "Directory of the arena and of the control socket, on a tmpfs that is shared with the trainer. Required.",
        }
    )
    root: str = field(
        default="",
        metadata={
            "env": names.ENV_ROOT,
            "text": "Directory of the checkpoints, or URL in a bucket. Empty: the trainer names it (a run without a cluster).",
        },
    )
    policy: str = field(
        default="",
        metadata={
            "env": names.ENV_POLICY,
            "text": "The CheckpointPolicy: a JSON document, or the path of a YAML or JSON file. Empty: the trainer's policy, or the defaults.",
        },
    )
    embedded: bool = field(
        default=False,
        metadata={
            "env": "PILLION_EMBEDDED",
            "text": "True for a sidecar that a trainer has started. It ends and removes its arena when all trainers have closed their"
            " sessions, or have been gone for linger_s.",
        },
    )
    peer_timeout_s: float = field(
        default=120.0,
        metadata={
            "env": names.ENV_PEER_TIMEOUT_S,
            "unit": "s",
            "text": "Timeout for all ranks to arrive at the same phase (seal, plan, outcome). Ranks of one step are seconds apart. The"
            " job itself notices a lost pod by the timeout of its collectives.",
        },
    )
    persist_timeout_s: float = field(
        default=1800.0,
        metadata={
            "env": "PILLION_PERSIST_TIMEOUT_S",
            "unit": "s",
            "text": "Timeout for one pod to write its part of a checkpoint: 96 GiB at 50 MB/s.",
        },
    )
    store_timeout_s: float = field(
        default=30.0,
        metadata={
            "env": "PILLION_STORE_TIMEOUT_S",
            "unit": "s",
            "text": "Timeout for the job's store to answer one request. If the request itself waits for a key, that wait is added. A"
            " running store answers within a millisecond. After the timeout the store counts as lost, and the pods exchange their"
            " messages on storage.",
        },
    )
    storage_timeout_s: float = field(
        default=300.0,
        metadata={
            "env": "PILLION_STORAGE_TIMEOUT_S",
            "unit": "s",
            "text": "Timeout for storage to take one block, or to answer one call. After the timeout the save fails, and the executor"
            " is replaced. Network file systems return from a failover within two or three minutes.",
        },
    )
    ping_timeout_s: float = field(
        default=30.0,
        metadata={
            "env": "PILLION_PING_TIMEOUT_S",
            "unit": "s",
            "text": "Timeout for the executor's answer to a ping. After the timeout the executor is replaced. It answers from a separate"
            " thread, so only a stopped or thrashing process is late.",
        },
    )
    linger_s: float = field(
        default=120.0,
        metadata={
            "env": names.ENV_LINGER_S,
            "unit": "s",
            "text": "Time for which an embedded sidecar keeps the arena after its trainers have died. torchrun restarts its workers"
            " within seconds.",
        },
    )
    owner_silent_s: float = field(
        default=10.0,
        metadata={
            "env": "PILLION_OWNER_SILENT_S",
            "unit": "s",
            "text": "Time without a sign of life after which a training loses its root to another training. The owner of a root writes"
            " a sign of life five times in this period. For a bucket the time is nine times as long, with three signs of life. Set the"
            " same value in all jobs that may use the root.",
        },
    )
    write_threads: int = field(
        default=2,
        metadata={
            "env": "PILLION_WRITE_THREADS",
            "text": "Number of direct writes in flight for each file. Two keep an NVMe disk busy.",
        },
    )
    log_level: str = field(
        default="INFO", metadata={"env": names.ENV_LOG_LEVEL, "text": "DEBUG, INFO, WARNING or ERROR."}
    )
    metrics_port: int = field(
        default=0,
        metadata={
            "env": names.ENV_METRICS_PORT,
            "least": 0,
            "text": "Port of the Prometheus endpoint. 0: no endpoint.",
        },
    )
    home_url: str = field(
        default="",
        metadata={
            "env": names.ENV_HOME_URL,
            "text": "URL of the controller, https://..., to which the sidecar sends its reports. Empty: it sends none.",
        },
    )
    home_ca: str = field(
        default="",
        metadata={
            "env": names.ENV_HOME_CA,
            "text": "Certificates (PEM) that verify the controller's server. Empty: the system's certificates.",
        },
    )
    token_file: str = field(
        default="",
        metadata={
            "env": names.ENV_TOKEN_FILE,
            "text": "File with the token for the reports. It is read for each report, because the kubelet renews it.",
        },
    )
    storage_ca: str = field(
        default="",
        metadata={
            "env": names.ENV_STORAGE_CA,
            "text": "File with certificates, PEM, that are trusted for an object store, beside those of the system.",
        },
    )
    local_dir: str = field(
        default="",
        metadata={
            "env": names.ENV_LOCAL_DIR,
            "text": "Directory on a disk of the node, for copies of saves until they are on storage. Empty: that of the policy's"
            " `storage.local.path`, if it has one.",
        },
    )
    pod_name: str = field(default="", metadata={"env": names.ENV_POD_NAME, "text": "Name of the pod, for reports."})
    pod_namespace: str = field(
        default="", metadata={"env": names.ENV_POD_NAMESPACE, "text": "Namespace of the pod, for reports."}
    )
    pod_uid: str = field(default="", metadata={"env": names.ENV_POD, "text": "UID of the pod, for reports."})
    completion_index: str = field(
        default="",
        metadata={
            "env": names.ENV_COMPLETION_INDEX,
            "text": "Index of the pod in an Indexed Job. Empty: the pod has none.",
        },
    )
    policy_name: str = field(
        default="",
        metadata={
            "env": names.ENV_POLICY_NAME,
            "text": "Name of the CheckpointPolicy object that the policy was read from.",
        },
    )
    job_kind: str = field(
        default="", metadata={"env": names.ENV_JOB_KIND, "text": "Kind of the object that owns the pod, such as Job."}
    )
    job_name: str = field(
        default="", metadata={"env": names.ENV_JOB_NAME, "text": "Name of the object that owns the pod."}
    )
    owner_uid: str = field(
        default="",
        metadata={
            "env": names.ENV_OWNER_UID,
            "text": "UID of the object that owns the pod, which tells it from another one with the same name. Empty: not known.",
        },
    )
    job_id: str = field(
        default="",
        metadata={"env": names.ENV_RUN_ID, "text": "Id of the job, which names the directory of its checkpoints."},
    )


def default_text(setting: Field[Any]) -> str:
    """Return a setting's default as help and documentation show it. Empty if there is none."""
    if setting.default is MISSING or setting.default == "":
        return ""
    unit = f" {setting.metadata['unit']}" if "unit" in setting.metadata else ""
    return f"{str(setting.default).lower() if setting.type == 'bool' else f'{setting.default:g}' if unit else setting.default}{unit}"


def from_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """
    Read flags and environment variables.

    Raises:
        SettingsError: one or more settings are wrong. Names all of them.
        SystemExit: an unknown flag, or --help. argparse prints the text.
    """
    parser = argparse.ArgumentParser(
        prog="pillion-sidecar run",
        description="Run the sidecar of one pod. A flag takes precedence over its environment variable, and the variable over the default.",
    )
    for setting in fields(Settings):
        flag = "--" + setting.name.replace("_", "-")
        default = default_text(setting)
        default_sentence = f" Default: {default}." if default else ""
        meaning = f"{setting.metadata['text']}{default_sentence} Environment: {setting.metadata['env']}"
        help_text = meaning.replace("%", "%%")
        if setting.type == "bool":
            parser.add_argument(flag, action="store_const", const="true", help=help_text)
        else:
            parser.add_argument(flag, metavar=setting.name.upper(), help=help_text)
    flags = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    problems: list[str] = []
    for setting in fields(Settings):
        text = flags[setting.name] if flags[setting.name] is not None else environ.get(setting.metadata["env"])
        if text is None or text == "":
            if setting.name == "runtime_dir":
                problems.append(f"--runtime-dir ({setting.metadata['env']}) is missing: a folder on a tmpfs is needed")
            continue
        try:
            values[setting.name] = _convert(str(setting.type), text, setting.metadata.get("least", 1))
        except ValueError:
            allowed = _ALLOWED[str(setting.type)].format(least=setting.metadata.get("least", 1))
            problems.append(f"{setting.metadata['env']}={text!r}: {allowed} is allowed")
    level = values.get("log_level", "INFO")
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        problems.append(f"{names.ENV_LOG_LEVEL}={level!r}: DEBUG, INFO, WARNING or ERROR is allowed")
    if not values.get("home_url", "https://").startswith("https://"):
        problems.append(f"{names.ENV_HOME_URL}={values['home_url']!r}: an https:// address is allowed")
    if problems:
        raise SettingsError(problems)
    return Settings(**values)


_ALLOWED = {
    "float": "a number of seconds above 0",
    "int": "a whole number of at least {least}",
    "bool": "true or false",
    "str": "text",
}


def _convert(kind: str, text: str, least: int) -> object:
    if kind == "bool":
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if kind == "float":
        number = float(text)
        if not 0 < number < float("inf"):
            raise ValueError(text)
        return number
    if kind == "int":
        if int(text) < least:
            raise ValueError(text)
        return int(text)
    return text


def is_policy_file(source: str) -> bool:
    """Whether a policy's source is the path of a file instead of a JSON text."""
    return bool(source) and not source.lstrip().startswith("{")


def read_policy(source: Mapping[str, object] | str | None) -> policy.Policy:
    """
    Return the policy of a document, a JSON text or a file's path. None or empty: the default policy.

    Raises:
        SettingsError: the file cannot be read, or the policy is invalid. Names all problems.
    """
    document: object = source or {}
    if isinstance(source, str) and source:
        text, origin = source, "the policy"
        if is_policy_file(source):
            origin = source
            try:
                with open(source, encoding="utf-8") as file:
                    text = file.read()
            except OSError as err:
                raise SettingsError(
                    [f"the policy file {source} cannot be read: {os.strerror(err.errno or 0)}"]
                ) from err
        try:
            document = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as err:
            raise SettingsError([f"{origin} is neither JSON nor YAML: {err}"]) from err
    if not isinstance(document, Mapping):
        raise SettingsError([f"the policy must be an object, not {type(document).__name__}"])
    try:
        return policy.parse(document, embedded=True)
    except policy.PolicyError as err:
        raise SettingsError([str(problem) for problem in err.problems]) from err
