"""The supervisor beside a storage that does not answer."""

import asyncio
import threading
from pathlib import Path

import pytest

from pillion.errors import SidecarError
from pillion_sidecar import settings, supervisor


def test_a_root_that_hangs_is_an_error_at_its_bound_and_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks next is refused at once, until the first look has come back; meanwhile the loop serves others."""
    monkeypatch.setattr(supervisor, "ROOT_TIMEOUT_S", 0.05)
    hangs = threading.Event()

    async def ask() -> list[str]:
        of = supervisor.Supervisor(settings.Settings(runtime_dir=str(tmp_path), embedded=True))
        told: list[str] = []
        first = asyncio.create_task(of._look_at("/lost", hangs.wait))
        for look in (first, of._look_at("/lost", lambda: None)):
            try:
                await look
            except SidecarError as err:
                told.append(str(err))
        hangs.set()
        while True:
            try:
                names = await asyncio.gather(
                    *(of._look_at("/back", lambda: threading.current_thread().name) for _ in "ab")
                )
            except SidecarError:
                await asyncio.sleep(0)
            else:
                assert names == ["root", "root"], "the looks of several ranks follow one another"
                break
        await of.stop()
        return told

    told = asyncio.run(ask())
    assert len(told) == 2
    assert all("the storage of /lost has not answered" in text for text in told)
