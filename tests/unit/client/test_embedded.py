"""
The whole of: whose runtime directory a trainer trusts, and what a sidecar that it starts inherits.

Called from: pytest.
Must never: start a sidecar.
"""

import os
import stat
import sys
from pathlib import Path

import pytest

from pillion import embedded
from pillion.errors import SidecarUnavailable


def test_a_folder_of_this_user_alone_is_trusted_and_one_that_is_not_there(tmp_path: Path) -> None:
    """A directory of an earlier start of this run, or one that does not exist yet."""
    folder = tmp_path / "ours"
    embedded.require_private(str(folder))
    folder.mkdir(mode=0o700)
    embedded.require_private(str(folder))


@pytest.mark.parametrize("made", ["symlink", "file", "open to others", "another user's"])
def test_a_folder_that_somebody_else_may_have_made_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """Its name can be guessed; what is in it is memory that the trainer maps and bytes that it unpickles."""
    folder = tmp_path / "guessed"
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    said = {
        "symlink": "is not a directory",
        "file": "is not a directory",
        "open to others": "is open to other users (mode 0755)",
        "another user's": f"belongs to user {os.getuid()}",
    }
    if made == "symlink":
        folder.symlink_to(target)
    elif made == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o755 if made == "open to others" else 0o700)
    if made == "another user's":
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(SidecarUnavailable) as refused:
        embedded.require_private(str(folder))
    assert said[made] in str(refused.value)
    assert str(folder) in str(refused.value)
    with pytest.raises(SidecarUnavailable):
        embedded._log_file(str(folder))


def test_the_log_is_in_the_folder_which_is_made_for_this_user_alone(tmp_path: Path) -> None:
    """Whatever the umask; a second sidecar adds to the log of the first."""
    folder = str(tmp_path / "run")
    before = os.umask(0)
    try:
        for text in (b"one\n", b"two\n"):
            with embedded._log_file(folder) as file:
                file.write(text)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.lstat(folder).st_mode) == 0o700
    assert Path(embedded.log_path(folder)).read_bytes() == b"one\ntwo\n"


def test_relative_entries_of_the_import_path_mean_the_trainers_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sidecar's working directory is another one; what the script itself could import goes along behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/somewhere/script", "lib"])
    made = embedded.environment({"PYTHONPATH": "src::/abs", "OTHER": "1"})
    assert made["PYTHONPATH"] == f"{tmp_path}/src:{tmp_path}:/abs"
    assert made["PILLION_IMPORT_PATH"] == f"{tmp_path}:/somewhere/script:{tmp_path}/lib"
    assert made["OTHER"] == "1"
    assert "PYTHONPATH" not in embedded.environment({})


def test_a_root_of_any_bytes_has_a_runtime_directory() -> None:
    """Linux takes any bytes for a name; those that are no UTF-8 had the constructor fail with a UnicodeEncodeError."""
    odd, other = (os.fsdecode(b"/runs/caf\xe9" + end) for end in (b"", b"\xff"))
    directories = {embedded.runtime_directory(root, {}) for root in (odd, other, odd)}
    assert len(directories) == 2
    assert all(path.isascii() for path in directories)
