"""The supervisor beside a storage that does not answer."""

import asyncio
import os
import threading
import types
from pathlib import Path
from typing import Any, cast

import pytest

from pillion.errors import SidecarError
from pillion.wire import policy
from pillion_sidecar import settings
from pillion_sidecar.arena.pod_arena import PodArena
from pillion_sidecar.supervisor import root_access, session_policy, trainers
from support.identities import identity


def test_a_root_that_hangs_is_an_error_at_its_bound_and_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks next is refused at once, until the first look has come back; meanwhile the loop serves others."""
    monkeypatch.setattr(root_access, "ROOT_TIMEOUT_S", 0.05)
    hangs = threading.Event()

    async def ask() -> list[str]:
        root = root_access.RootAccess("")
        errors: list[str] = []
        first = asyncio.create_task(root.look_at("/lost", hangs.wait))
        for look in (first, root.look_at("/lost", lambda: None)):
            try:
                await look
            except SidecarError as err:
                errors.append(str(err))
        hangs.set()
        while True:
            try:
                names = await asyncio.gather(
                    *(root.look_at("/back", lambda: threading.current_thread().name) for _ in "ab")
                )
            except SidecarError:
                await asyncio.sleep(0)
            else:
                assert names == ["root", "root"], "the looks of several ranks follow one another"
                break
        root.close()
        return errors

    told = asyncio.run(ask())
    assert len(told) == 2
    assert all("the storage of /lost has not answered" in text for text in told)


def test_a_policy_file_on_storage_that_hangs_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was read in the loop, which answered nothing meanwhile, not even the executor's death."""
    monkeypatch.setattr(root_access, "ROOT_TIMEOUT_S", 0.05)
    path = tmp_path / "policy.yaml"
    os.mkfifo(path)  # whoever opens it waits for a writer

    async def ask() -> str:
        root, nobody = root_access.RootAccess(""), cast("Any", None)
        own = settings.Settings(runtime_dir=str(tmp_path), embedded=True)
        try:
            await session_policy.SessionPolicy(own, root, nobody).begin(str(path))
        except SidecarError as err:
            return str(err)
        finally:
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
            root.close()
        raise AssertionError("it was read")

    assert f"the storage of {path} has not answered" in asyncio.run(ask())


def test_a_session_whose_trainers_are_all_back_has_not_crashed(tmp_path: Path) -> None:
    """A sidecar that replaced a killed one waited for a restart for two minutes behind a clean end, with the arena."""
    nobody: Any = None
    of = trainers.Trainers(nobody, nobody, on_policy=lambda _: None, on_rescue=lambda _: None)
    pod = PodArena(str(tmp_path), identity("a" * 32, tmp_path, None), policy.parse({}, embedded=True))
    of.adopt_session(pod, ())
    of.join(0, cast("Any", types.SimpleNamespace(pid=os.getpid())))
    assert not of.crashed
    of.end_session()
