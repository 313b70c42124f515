"""
The whole of: the completion of a shell knows every command, and bash takes it.

Called from: pytest.
"""

import subprocess
from pathlib import Path

import pytest

from pillion_sidecar.cli import main
from support.deadlines import Deadline


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_every_command_is_completed(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And the arguments of each."""
    assert main.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in main.COMMANDS:
        assert name in script
    assert "max-shard-size" in script


def test_bash_completes_a_command_and_its_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As at the Tab key."""
    assert main.main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = (
        f'. {tmp_path}/script; COMP_WORDS=(pillion ver); COMP_CWORD=1; _shtab_pillion; echo "${{COMPREPLY[@]}}";'
        ' COMP_WORDS=(pillion export --max); COMP_CWORD=2; _shtab_pillion; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=Deadline.REPLY.s, check=True)
    assert done.stdout.split() == ["verify", "--max-shard-size"]
