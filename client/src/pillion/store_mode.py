"""
Which store the sidecars of several pods use, and how a session opens on it.

Called from: `Checkpointer`, `pillion.dcp` (all ranks, once).

    DCP_USE_PREFIX_STORE   pods   store
    "1"                    any    a prefix of the job's TCPStore; with several ranks a missing or malformed MASTER_ADDR/PORT is an error
    any other value        > 1    a separate store, which the coordinator's sidecar hosts on a free port
    unset                  > 1    the policy's `store` (Prefix by default; a separate store if the job has no TCPStore)
    any                    1      none: all ranks share one sidecar, which needs no store to agree with itself

For torch's own executor an unset variable means a separate store. Here it means the policy's `store`, as a prefix needs no port. A job
of one rank never reads MASTER_ADDR and MASTER_PORT, even if the variable is "1".
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from pillion import connection, embedded, group, policy_source
from pillion import session as session_module
from pillion.errors import PillionError, SettingsError, SidecarUnavailable
from pillion.wire import control, names, policy
from pillion.wire.message import Message


def choose(
    members: group.Group, environ: Mapping[str, str], *, policy_store: str = policy.StoreMode.PREFIX
) -> control.MeetingStore | None:
    """
    Return the store to meet in; None for no store. All ranks decide on the same facts: those of rank 0.

    Raises:
        SettingsError: the environment requires prefix mode, and gives no address of the job's store.
    """
    switch = environ.get(names.ENV_PREFIX_STORE)
    if switch == "1" and members.world_size > 1 and members.store is None:
        raise SettingsError([f"{names.ENV_PREFIX_STORE}=1: {members.store_problem}"])
    if len(members.pods) == 1:
        return None
    if switch is not None:
        return control.MeetingStore.PREFIX if switch == "1" else control.MeetingStore.OWN
    is_prefix = policy_store == policy.StoreMode.PREFIX and members.store is not None
    return control.MeetingStore.PREFIX if is_prefix else control.MeetingStore.OWN


def policy_of_all(
    given: Mapping[str, Any] | str | os.PathLike[str] | None, environ: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """
    Return the policy of rank 0, with which all ranks begin: the injected sidecar's, else the document's. See `group.join`.

    Blocks: see `_injected_policy` and `policy_source.read`.
    """
    if names.ENV_RUNTIME_DIR in environ:
        return _injected_policy(environ)
    try:
        return policy_source.read(policy_source.document(given, environ))
    except SettingsError:
        return None  # not raised here, where the other ranks wait for this one: opening the session raises it


def _injected_policy(environ: Mapping[str, str]) -> Mapping[str, Any] | None:
    """
    Request the injected sidecar's policy before there is a session.

    Blocks: up to session_module.CONNECT_TIMEOUT_S until the sidecar listens.

    Returns:
        The policy as a document. None: a run without a cluster, or no answer; then opening the session raises the cause.
    """
    if names.ENV_RUNTIME_DIR not in environ:
        return None
    path = os.path.join(environ[names.ENV_RUNTIME_DIR], names.CONTROL_SOCKET)
    deadline = time.monotonic() + session_module.CONNECT_TIMEOUT_S
    while True:
        try:
            answer = connection.ask(path, control.ReadPolicy(), session_module.REQUEST_TIMEOUT_S)
            return answer.policy if isinstance(answer, control.CurrentPolicy) else None
        except SidecarUnavailable:
            if time.monotonic() > deadline:
                return None
            time.sleep(embedded.POLL_S)


def open_session(
    members: group.Group,
    *,
    root: str,
    policy_document: Mapping[str, object] | str | None,
    key: str,
    on_event: Callable[[Message], None],
    process_group: dist.ProcessGroup | None,
    environ: Mapping[str, str],
) -> session_module.Session:
    """
    Open this rank's session. In `own` mode the ranks first agree on the store that the coordinator's sidecar hosts.

    Ranks: all.

    Raises:
        SettingsError: the store's address is needed and missing or malformed (on every rank).
        SidecarUnavailable, ProtocolMismatch.
    """
    mode = choose(members, environ, policy_store=str((members.policy or {}).get("store", policy.StoreMode.PREFIX)))

    def opened(ranks: group.Group) -> session_module.Session:
        return session_module.Session(
            ranks,
            root=root,
            policy_document=policy_document,
            key=key,
            store_mode=mode,
            on_event=on_event,
            environ=environ,
        )

    if mode is not control.MeetingStore.OWN:
        return opened(members)
    # Rank 0 opens first: its sidecar hosts the store, and its welcome has the address. The others get that address, or the error.
    shared: list[Any] = [None]
    session = None
    try:
        if members.rank == 0:
            session = opened(members)
            shared = [session.welcome.store or "the coordinator's sidecar did not say where it hosts the store"]
    except PillionError as err:
        shared = [f"rank 0: {err}"]
        raise
    finally:
        # By global rank: torch 2.6 has no `group_src`.
        source = 0 if process_group is None else dist.get_global_rank(process_group, 0)
        dist.broadcast_object_list(shared, src=source, group=process_group)
    if session is not None:
        return session
    if not isinstance(shared[0], (list, tuple)):
        raise SidecarUnavailable(str(shared[0]))
    return opened(_with_store(members, group.StoreAddress(str(shared[0][0]), int(shared[0][1]))))


def _with_store(members: group.Group, address: group.StoreAddress) -> group.Group:
    return dataclasses.replace(members, store=address, store_problem="")
