"""
Who the ranks are: rank, world size, which ranks share a pod, and where the job's store is.

Called from: `Checkpointer` and `pillion.dcp`, once, before training (all ranks). This is the only collective of Pillion. It runs on the
caller's process group. Afterwards the sidecars communicate through the job's store.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch.distributed as dist

from pillion.errors import SettingsError, UsageError
from pillion.wire import names


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """The job's TCPStore as the coordinator's environment names it."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This rank and its peers, as a `hello` describes them to the sidecar."""

    rank: int
    world_size: int
    pods: tuple[tuple[int, ...], ...]
    """Ranks of each pod, ordered by the pod's first rank. The coordinator is the pod of rank 0."""
    placement: str = ""
    """Digest of which pod has which ranks, 32 hex digits. After a change, snapshots in memory lie in pods of other ranks."""
    run_id: str
    session: str
    """Random id that rank 0 draws at every start of the trainers, 32 hex digits."""
    store: StoreAddress | None
    """None if there is no TCPStore. Then `store_problem` has the cause."""
    store_problem: str
    attempt: int
    """torchrun's restart count, for people. Programs compare sessions instead."""
    policy: Mapping[str, Any] | None = None
    """The policy of rank 0: its injected sidecar's, or its document's. All ranks begin with it, as their own sidecars may learn of a change
    at different times. None: a job of one rank, or the policy cannot be read. Then each rank takes its own sidecar's policy."""

    @property
    def local_ranks(self) -> tuple[int, ...]:
        return next(pod for pod in self.pods if self.rank in pod)

    @property
    def local_rank(self) -> int:
        """Index of this rank within its pod."""
        return self.local_ranks.index(self.rank)


def store_address(environ: Mapping[str, str]) -> StoreAddress:
    """
    The job's store from ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        ValueError: a variable is missing or malformed. Names it, its value and what is allowed.
    """
    host, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if not host:
        raise ValueError("MASTER_ADDR is not set: the address of the job's TCPStore is needed to use a prefix of it")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"MASTER_PORT is {port!r}: a port between 1 and 65535 is needed to use a prefix of the job's store"
        )
    return StoreAddress(host, int(port))


def pod_identity(environ: Mapping[str, str]) -> str:
    """Return the identity that ranks with one memory and one sidecar share: the injected pod UID, else host name and boot id."""
    pod = environ.get(names.ENV_POD)
    if pod:
        return pod
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}/{boot}"


def join(
    process_group: dist.ProcessGroup | None,
    environ: Mapping[str, str] | None = None,
    *,
    root: str | None = None,
    read_policy: Callable[[Mapping[str, str]], Mapping[str, Any] | None] = lambda _: None,
) -> Group:
    """
    Agree on the group.

    Args:
        process_group: the ranks. None is the default group.
        environ: the environment. None: this process's.
        root: directory of this rank's checkpoints. Empty: not given. None: the caller has no root to agree on.
        read_policy: called with the environment on rank 0, if there are several ranks. Its result becomes every rank's `Group.policy`.

    Ranks: all of the process group, in the same order. Without an initialised process group this is a group of one.

    Blocks: one `all_gather_object`, bounded by the process group's own timeout.

    Raises:
        UsageError: this process is not in the process group.
        SettingsError: a rank has no root, or the roots differ; on every rank. NumPy is not installed, which torch needs for several ranks.
    """
    environ = os.environ if environ is None else environ
    distributed = dist.is_available() and dist.is_initialized()
    mine: dict[str, object] = {
        "pod": pod_identity(environ),
        "session": uuid.uuid4().hex,
        "run": environ.get(names.ENV_RUN_ID) or environ.get("TORCHELASTIC_RUN_ID") or "default",
        "attempt": environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        "store": None,
        "problem": "",
        "root": root,
    }
    try:
        address = store_address(environ)
        mine["store"] = [address.host, address.port]
    except ValueError as err:
        mine["problem"] = str(err)
    if not distributed:
        mine["store"], mine["problem"] = None, "no process group is initialised"
        _check_roots([root])
        return _group(0, [mine])
    if dist.get_rank(process_group) < 0:
        raise UsageError(
            f"rank {dist.get_rank()} is not in the process group: call this on the members of the group only"
        )
    require_numpy()
    if dist.get_rank(process_group) == 0 and dist.get_world_size(process_group) > 1:
        mine["policy"] = read_policy(environ)
    entries: list[dict[str, object]] = [{} for _ in range(dist.get_world_size(process_group))]
    dist.all_gather_object(entries, mine, group=process_group)
    _check_roots([entry.get("root") for entry in entries])
    return _group(dist.get_rank(process_group), entries)


def require_numpy() -> None:
    """
    Ranks exchange Python objects through torch, which needs NumPy for it and installs without. Its own error names no remedy, and comes in
    the middle of a collective.

    Raises:
        SettingsError: NumPy is not installed.
    """
    if importlib.util.find_spec("numpy") is None:
        raise SettingsError(
            [
                "NumPy is not installed: torch needs it to exchange objects between several ranks; run `pip install numpy`"
            ]
        )


ROOTS_SHOWN: Final = 4
"""Maximum different roots that an error names."""
RANKS_SHOWN: Final = 8
"""Maximum ranks that an error names for each root."""


def _check_roots(roots: Sequence[object]) -> None:
    """
    Raises:
        SettingsError: see `join`. Every rank has the same list, and raises the same.
    """
    ranks: dict[object, list[int]] = {}
    for rank, root in enumerate(roots):
        ranks.setdefault(root, []).append(rank)
    if "" in ranks:
        who = "" if len(roots) == 1 else f" on ranks {_some(ranks[''])}"
        raise SettingsError([f"no root{who}: call Checkpointer(root), or set {names.ENV_ROOT}"])
    if len(ranks) > 1:
        listing = "; ".join(
            f"{root!r} on ranks {_some(members)}" for root, members in list(ranks.items())[:ROOTS_SHOWN]
        )
        raise SettingsError(
            [
                f"the root differs from rank to rank ({listing}): give every rank the same root, on storage that all of them share"
            ]
        )


def _some(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:RANKS_SHOWN]))
    return f"{shown} and {len(ranks) - RANKS_SHOWN} more" if len(ranks) > RANKS_SHOWN else shown


def _group(rank: int, entries: Sequence[Mapping[str, object]]) -> Group:
    """Return the group. Pure: every rank computes the same from the same entries. Values of the whole job come from rank 0."""
    pods: dict[object, list[int]] = {}
    for member, entry in enumerate(entries):
        pods.setdefault(entry["pod"], []).append(member)
    first = entries[0]
    store = first["store"]
    attempt, policy = str(first["attempt"]), first.get("policy")
    return Group(
        rank=rank,
        world_size=len(entries),
        pods=tuple(sorted(tuple(ranks) for ranks in pods.values())),
        placement=hashlib.sha256(
            json.dumps(sorted((str(pod), ranks) for pod, ranks in pods.items())).encode()
        ).hexdigest()[:32],
        run_id=str(first["run"]),
        session=str(first["session"]),
        store=StoreAddress(str(store[0]), int(store[1])) if isinstance(store, (list, tuple)) else None,
        store_problem=str(first["problem"]),
        attempt=int(attempt) if attempt.isdigit() else 0,
        policy=policy if isinstance(policy, Mapping) else None,
    )
