"""
The whole of: `pillion` on checkpoints that trainings really made, in a directory and in a bucket: it lists, shows and verifies them.

Called from: pytest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch.distributed import checkpoint as stock

from pillion import checkpointer
from pillion_sidecar.cli import main, reading
from pillion_sidecar.cli.exits import Exit
from process.ranks import Peer, Ranks
from support.deadlines import Deadline
from support.object_stores import behind
from support.object_stores.places import Place

STRETCH_BYTES: Final = 1 << 16
LARGE: Final = 100_003
"""Elements of 8 bytes: a tensor that is read in many stretches."""


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a tensor need not be large to be read in several."""
    monkeypatch.setattr(reading, "STRETCH_BYTES", STRETCH_BYTES)


def state_of(step: int) -> dict[str, Any]:
    small = {f"layer{number}": torch.full((3, number + 1), float(step), dtype=torch.bfloat16) for number in range(4)}
    return {"model": small, "empty": torch.zeros(0, 7), "opt": {"step": step, "large": torch.arange(LARGE) + step}}


@pytest.fixture
def root(ranks: Ranks, tmp_path: Path) -> Path:
    """Steps 1 and 2 of a training of two ranks, which share a sidecar."""

    def train(peer: Peer) -> None:
        with checkpointer.Checkpointer(tmp_path / "run") as opened:
            for step in (1, 2):
                state = state_of(step) | {"own": {f"rank{peer.rank}": torch.full((5,), peer.rank)}}
                opened.save(state, step).result(Deadline.COMMITTED.s)

    ranks.start(train, num_ranks=2).finish()
    ranks.alone()
    return tmp_path / "run"


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object, status: Exit = Exit.WELL) -> str:
    """Standard output of a command that ends with this status."""
    assert main.main(list(map(str, arguments))) == status
    return capsys.readouterr().out


def test_a_training_of_two_ranks_is_listed_shown_and_verified(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every fact is that of the training; what was damaged is named, and the other step is not touched by it."""
    steps = json.loads(output_of(capsys, "ls", root, "-o", "json"))
    assert [(each["step"], each["state"], each["worldSize"], each["newest"]) for each in steps] == [
        (1, "committed", 2, False),
        (2, "committed", 2, True),
    ]
    assert output_of(capsys, "ls", root, "-o", "name").split() == [str(root / "step-1"), str(root / "step-2")]

    shown = json.loads(output_of(capsys, "show", root, "-o", "json"))
    tensors = {each["name"]: (each["dtype"], each["shape"]) for each in shown["tensors"]}
    assert tensors["opt.large"] == ("int64", [LARGE])
    assert tensors["model.layer3"] == ("bfloat16", [3, 4])
    assert tensors["empty"] == ("float32", [0, 7])
    assert {"own.rank0", "own.rank1"} <= tensors.keys()
    assert [each["name"] for each in shown["opaque"]] == ["opt.step"]
    assert set(shown["files"]) == {path.name for path in (root / "step-2").iterdir()}
    table = output_of(capsys, "show", root, "latest", "--include", "model.*", "--files")
    assert "opt.large" not in table
    assert "model.layer0" in table
    assert "pillion-manifest.json" in table

    verified = json.loads(output_of(capsys, "verify", root, "--all", "-o", "json"))
    assert [(each["step"], each["result"], each["problems"]) for each in verified] == [
        (1, "intact", []),
        (2, "intact", []),
    ]
    assert verified[0]["bytesRead"] > 8 * LARGE

    [large] = [each for each in shown["tensors"] if each["name"] == "opt.large"]
    [chunk] = large["chunks"]
    with open(root / "step-2" / chunk["file"], "r+b") as file:
        file.seek(chunk["offset"] + chunk["length"] // 2)
        file.write(b"\x55")
    broken = json.loads(output_of(capsys, "verify", root, "--all", "-o", "json", status=Exit.FOUND))
    assert [each["result"] for each in broken] == ["intact", "damaged"]
    [problem] = broken[1]["problems"]
    assert "'opt.large'" in problem
    assert chunk["file"] in problem


def test_files_that_are_gone_or_too_short_are_one_problem_each(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest of the checkpoint is verified nevertheless."""
    data = sorted((root / "step-2").glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(data[-1], data[-1].stat().st_size // 2)
    data[0].unlink()
    [found] = json.loads(output_of(capsys, "verify", root, "2", "-o", "json", status=Exit.FOUND))
    assert len(found["problems"]) == 2
    assert any("too short" in problem and data[-1].name in problem for problem in found["problems"])
    assert any("No such file" in problem and data[0].name in problem for problem in found["problems"])
    assert main.main(["verify", str(root), "1"]) == Exit.WELL


def test_a_lost_manifest_and_another_marker_are_damage_and_are_not_mended(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`verify` and `show` write nothing, also where the next load would mend the commit."""
    (root / "step-1" / "pillion-manifest.json").unlink()
    marker = (root / "step-2" / ".metadata").read_bytes()
    (root / "step-2" / ".metadata").write_bytes(marker + b" ")
    before = sorted(root.rglob("*"))
    found = json.loads(output_of(capsys, "verify", root, "--all", "-o", "json", status=Exit.FOUND))
    assert "pillion-manifest.json: is missing" in found[0]["problems"][0]
    assert ".metadata: expected digest" in found[1]["problems"][0]
    assert main.main(["show", str(root), "1"]) == Exit.FOUND
    assert "is missing" in capsys.readouterr().err
    assert sorted(root.rglob("*")) == before
    assert (root / "step-2" / ".metadata").read_bytes() == marker + b" "


def test_a_checkpoint_of_stock_dcp_is_shown_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By itself, without a root; it has no digests, and what is cut off is named."""
    folder = tmp_path / "final"
    stock.save({"w": torch.ones(70, 9), "n": [1]}, checkpoint_id=folder, no_dist=True)
    assert "70x9" in output_of(capsys, "show", folder)
    [found] = json.loads(output_of(capsys, "verify", folder, "-o", "json"))
    assert (found["result"], found["digests"]) == ("readable", False)
    [data] = folder.glob("*.distcp")
    os.truncate(data, 100)
    [found] = json.loads(output_of(capsys, "verify", folder, "-o", "json", status=Exit.FOUND))
    assert "too short" in found["problems"][0]


def test_a_bucket_is_listed_shown_and_verified(
    ranks: Ranks, s3_bucket: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --endpoint; an object that was replaced is damage; a wrong key is a storage that cannot be reached."""
    url, policy = f"{s3_bucket.url}/run", {"storage": {"objectStore": {"endpoint": s3_bucket.endpoint}}}

    def train(_: Peer) -> None:
        with checkpointer.Checkpointer(url, policy=policy) as opened:
            opened.save(state_of(1), 1).result(Deadline.COMMITTED.s)

    ranks.start(train, env=s3_bucket.environment).finish()
    ranks.alone()
    for name, value in s3_bucket.environment.items():
        monkeypatch.setenv(name, value)
    store = ["--endpoint", s3_bucket.endpoint]
    assert " newest" in output_of(capsys, "ls", url, *store)
    assert "model.layer3" in output_of(capsys, "show", f"{url}/step-1", *store)
    assert "intact" in output_of(capsys, "verify", url, *store)
    client = s3_bucket.client()
    [name] = [each for each in behind.files(s3_bucket, "run/step-1") if each.startswith("__0_0")]
    key = f"run/step-1/{name}"
    data = bytearray(client.get(key).bytes())
    data[len(data) // 2] ^= 1
    client.put(key, bytes(data))
    assert "damaged" in output_of(capsys, "verify", url, *store, status=Exit.FOUND)
    assert main.main(["ls", f"{s3_bucket.url}/other", *store]) == Exit.FOUND
    assert "has no objects" in capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert main.main(["ls", url, *store]) == Exit.UNREACHABLE
    assert url in capsys.readouterr().err


def test_the_program_is_quiet_in_a_pipe_and_needs_no_torch(root: Path) -> None:
    """What pip installs: no bar on standard error, no traceback when `head` closes the pipe, and no import of torch."""
    program = Path(sys.executable).with_name("pillion")
    done = subprocess.run(
        [program, "verify", root], capture_output=True, text=True, check=True, timeout=Deadline.SCRIPT.s
    )
    assert (done.stderr, "intact" in done.stdout) == ("", True)
    closed = subprocess.run(
        ["sh", "-c", '"$0" show "$1" -o json | head -n 1', program, root],
        capture_output=True,
        text=True,
        check=True,
        timeout=Deadline.SCRIPT.s,
    )
    assert (closed.stderr, closed.stdout) == ("", "{\n")
    code = "import sys; from pillion_sidecar.cli import main; print(main.main(['verify', sys.argv[1]]), 'torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code, root], capture_output=True, text=True, check=True, timeout=Deadline.SCRIPT.s
    )
    assert told.stdout.splitlines()[-1] == "0 False"
