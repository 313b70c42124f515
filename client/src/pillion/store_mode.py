"""
Which store the sidecars of several pods meet in, and opening a session on it.

Called from: `Checkpointer`, `pillion.dcp` (all ranks, once).

    DCP_USE_PREFIX_STORE   pods   store
    "1"                    any    a prefix of the job's TCPStore; with several ranks a missing or malformed MASTER_ADDR/PORT is an error
    any other value        > 1    a store of our own, hosted by the coordinator's sidecar on a free port
    unset                  > 1    the policy's `store` (Prefix by default; our own where the job has no TCPStore)
    any                    1      none: all ranks share one sidecar, which needs no store to agree with itself

torch's own executor takes an unset variable for a store of its own. Here it is the policy's, as a prefix needs no port; and a job of
one rank never looks at MASTER_ADDR and MASTER_PORT, also where the variable is "1".
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
from pillion.wire import messages, names


def choose(members: group.Group, environ: Mapping[str, str], *, policy_store: str = "Prefix") -> str | None:
    """
    ``prefix``, ``own`` or None (no store).

    Raises:
        SettingsError: prefix mode was asked for, and the job's store cannot be named. All ranks decide on the same facts:
            those of rank 0.
    """
    asked = environ.get(names.ENV_PREFIX_STORE)
    if asked == "1" and members.world_size > 1 and members.store is None:
        raise SettingsError([f"{names.ENV_PREFIX_STORE}=1: {members.store_problem}"])
    if len(members.pods) == 1:
        return None
    if asked is not None:
        return "prefix" if asked == "1" else "own"
    return "prefix" if policy_store == "Prefix" and members.store is not None else "own"


def policy_of_all(
    given: Mapping[str, Any] | str | os.PathLike[str] | None, environ: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """
    The policy that all ranks begin with, as rank 0 knows it: the injected sidecar's, else the document's. See `group.join`.

    Blocks: see `_injected_policy` and `policy_source.read`.
    """
    if names.ENV_RUNTIME_DIR in environ:
        return _injected_policy(environ)
    try:
        return policy_source.read(policy_source.document(given, environ))
    except SettingsError:
        return None  # the other ranks wait for this one; it is raised when the session is opened


def _injected_policy(environ: Mapping[str, str]) -> Mapping[str, Any] | None:
    """
    What the injected sidecar goes by, asked before there is a session.

    Blocks: up to session_module.CONNECT_TIMEOUT_S for it to listen.

    Returns:
        The policy as a document. None: a run without a cluster, or it does not say; opening the session then tells why.
    """
    if names.ENV_RUNTIME_DIR not in environ:
        return None
    path = os.path.join(environ[names.ENV_RUNTIME_DIR], names.CONTROL_SOCKET)
    deadline = time.monotonic() + session_module.CONNECT_TIMEOUT_S
    while True:
        try:
            answer = connection.ask(path, {"type": "policy"}, session_module.REQUEST_TIMEOUT_S)
            return messages.optional_field(answer, "policy", dict)
        except messages.BadFrame:
            return None
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
    on_event: Callable[[messages.Message], None],
    process_group: dist.ProcessGroup | None,
    environ: Mapping[str, str],
) -> session_module.Session:
    """
    Open this rank's session; in `own` mode the ranks first agree on the store that the coordinator's sidecar hosts.

    Ranks: all.

    Raises:
        SettingsError: the store's address is needed and missing or malformed (on every rank).
        SidecarUnavailable, ProtocolMismatch.
    """
    mode = choose(members, environ, policy_store=str((members.policy or {}).get("store", "Prefix")))

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

    if mode != "own":
        return opened(members)
    # Rank 0 goes first: its sidecar hosts the store, and says where in its welcome. The others learn it, or its error.
    shared: list[Any] = [None]
    session = None
    try:
        if members.rank == 0:
            session = opened(members)
            shared = [session.welcome.get("store") or "the coordinator's sidecar did not say where it hosts the store"]
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
