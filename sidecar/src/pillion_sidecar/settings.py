"""
The sidecar's settings: one frozen value, read from flags and environment in one place.

Called from: `__main__`. A flag wins over its environment variable, which wins over the default. The bounds that a
deployment may have to change are here, each with its unit and its reason; all problems are reported together.
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
    What one sidecar runs with.

    Each field's metadata: ``env``, its variable; ``text``, what it means, for `run --help` and docs/reference/settings.md; ``unit``
    where it is a quantity; ``least`` where 1 is not the least.
    """

    runtime_dir: str = field(
        metadata={
            "env": names.ENV_RUNTIME_DIR,
            "text": "Folder of the arena and of the control socket: on a tmpfs that is shared with the trainer. Must be given.",
        }
    )
    root: str = field(
        default="",
        metadata={
            "env": names.ENV_ROOT,
            "text": "Where checkpoints go. Empty: the trainer says it (a run without a cluster).",
        },
    )
    policy: str = field(
        default="",
        metadata={
            "env": names.ENV_POLICY,
            "text": "The CheckpointPolicy: a JSON document, or the path of a YAML or JSON file. Empty: the trainer's, or the defaults.",
        },
    )
    embedded: bool = field(
        default=False,
        metadata={
            "env": "PILLION_EMBEDDED",
            "text": "Started by a trainer: ends by itself, and removes its arena, when the trainers have parted or are gone for linger_s.",
        },
    )
    peer_timeout_s: float = field(
        default=120.0,
        metadata={
            "env": names.ENV_PEER_TIMEOUT_S,
            "unit": "s",
            "text": "Bound for every rank to arrive at a phase (seal, plan, outcome). Ranks of one step are seconds apart; a pod that is"
            " gone is noticed by the job itself within its own collective timeout.",
        },
    )
    persist_timeout_s: float = field(
        default=1800.0,
        metadata={
            "env": "PILLION_PERSIST_TIMEOUT_S",
            "unit": "s",
            "text": "Bound for one pod to write its part: 96 GiB at 50 MB/s.",
        },
    )
    store_timeout_s: float = field(
        default=30.0,
        metadata={
            "env": "PILLION_STORE_TIMEOUT_S",
            "unit": "s",
            "text": "Bound for the job's store to answer one question, beyond any wait that the question asks for; it does in less than"
            " a millisecond while its process runs. Then the pods meet on storage.",
        },
    )
    storage_timeout_s: float = field(
        default=300.0,
        metadata={
            "env": "PILLION_STORAGE_TIMEOUT_S",
            "unit": "s",
            "text": "Bound for storage to take one block, or to answer one call: the executor that waits longer is replaced, and the save"
            " fails. Network file systems come back from a failover within two or three minutes.",
        },
    )
    ping_timeout_s: float = field(
        default=30.0,
        metadata={
            "env": "PILLION_PING_TIMEOUT_S",
            "unit": "s",
            "text": "An executor that answers no ping for this long hangs, and is replaced. It answers from a thread of its own, so that"
            " only a stopped or thrashing process is late.",
        },
    )
    linger_s: float = field(
        default=120.0,
        metadata={
            "env": names.ENV_LINGER_S,
            "unit": "s",
            "text": "How long an embedded sidecar keeps the arena for trainers that died: torchrun restarts its workers in seconds.",
        },
    )
    owner_silent_s: float = field(
        default=10.0,
        metadata={
            "env": "PILLION_OWNER_SILENT_S",
            "unit": "s",
            "text": "How long the training that owns a root may show no sign of life before another one may have the root. It shows one five"
            " times as often. The same in every job that may use the root.",
        },
    )
    write_threads: int = field(
        default=2,
        metadata={
            "env": "PILLION_WRITE_THREADS",
            "text": "Direct writes in flight for each file; two keep an NVMe disk busy.",
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
            "text": "Port of the Prometheus endpoint; 0: none.",
        },
    )
    home_url: str = field(
        default="",
        metadata={
            "env": names.ENV_HOME_URL,
            "text": "Where the sidecar calls home, https://...; empty: it does not.",
        },
    )
    home_ca: str = field(
        default="",
        metadata={
            "env": names.ENV_HOME_CA,
            "text": "Certificates, PEM, that the server there is trusted by. Empty: those of the system.",
        },
    )
    token_file: str = field(
        default="",
        metadata={
            "env": names.ENV_TOKEN_FILE,
            "text": "File of the token to call home with; read for each call, as the kubelet renews it.",
        },
    )
    pod_name: str = field(default="", metadata={"env": names.ENV_POD_NAME, "text": "Who reports: the pod's name."})
    pod_namespace: str = field(
        default="", metadata={"env": names.ENV_POD_NAMESPACE, "text": "Who reports: the pod's namespace."}
    )
    pod_uid: str = field(default="", metadata={"env": names.ENV_POD, "text": "Who reports: the pod's UID."})
    completion_index: str = field(
        default="",
        metadata={
            "env": names.ENV_COMPLETION_INDEX,
            "text": "Index of the pod in an Indexed Job; empty: it has none.",
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
        default="", metadata={"env": names.ENV_JOB_KIND, "text": "Kind of what the user made, a Job say."}
    )
    job_name: str = field(default="", metadata={"env": names.ENV_JOB_NAME, "text": "Its name."})
    owner_uid: str = field(
        default="",
        metadata={
            "env": names.ENV_OWNER_UID,
            "text": "Its UID, which tells it from another of that name. Empty: not known.",
        },
    )
    job_id: str = field(
        default="", metadata={"env": names.ENV_RUN_ID, "text": "The id that names the job's checkpoints."}
    )


def default_text(setting: Field[Any]) -> str:
    """A setting's default as help and documentation show it: empty where there is none."""
    if setting.default is MISSING or setting.default == "":
        return ""
    unit = f" {setting.metadata['unit']}" if "unit" in setting.metadata else ""
    return f"{str(setting.default).lower() if setting.type == 'bool' else f'{setting.default:g}' if unit else setting.default}{unit}"


def from_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """
    Read flags and environment.

    Raises:
        SettingsError: everything that is wrong, at once.
        SystemExit: a flag that does not exist, or --help (argparse's own words).
    """
    parser = argparse.ArgumentParser(
        prog="pillion-sidecar run",
        description="Run the sidecar of one pod. A flag wins over its environment variable, which wins over the default.",
    )
    for each in fields(Settings):
        flag = "--" + each.name.replace("_", "-")
        default = default_text(each)
        meaning = (
            f"{each.metadata['text']}{f' Default: {default}.' if default else ''} Environment: {each.metadata['env']}"
        )
        help_text = meaning.replace("%", "%%")
        if each.type == "bool":
            parser.add_argument(flag, action="store_const", const="true", help=help_text)
        else:
            parser.add_argument(flag, metavar=each.name.upper(), help=help_text)
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    problems: list[str] = []
    for each in fields(Settings):
        text = given[each.name] if given[each.name] is not None else environ.get(each.metadata["env"])
        if text is None or text == "":
            if each.name == "runtime_dir":
                problems.append(f"--runtime-dir ({each.metadata['env']}) is missing: a folder on a tmpfs is needed")
            continue
        try:
            values[each.name] = _convert(str(each.type), text, each.metadata.get("least", 1))
        except ValueError:
            allowed = _ALLOWED[str(each.type)].format(least=each.metadata.get("least", 1))
            problems.append(f"{each.metadata['env']}={text!r}: {allowed} is allowed")
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
    """Whether a policy is given as the path of a file, and not as its text."""
    return bool(source) and not source.lstrip().startswith("{")


def read_policy(source: Mapping[str, object] | str | None) -> policy.Policy:
    """
    A policy from a document, a JSON text or a file's path.

    Raises:
        SettingsError: the file cannot be read, or the policy is wrong; every problem at once.
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
