"""
The whole of: `pillion save` and `pillion doctor` beside a training that runs, and in a cluster as far as kubectl's answers show it.

Called from: pytest.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pillion import checkpointer
from pillion_sidecar.cli import main
from pillion_sidecar.cli.exits import Exit
from process.ranks import Job, Peer, Ranks
from support.deadlines import Deadline


@pytest.fixture
def runtime(ranks: Ranks, tmp_path: Path) -> tuple[Job, Path, str]:
    """A training that asks `due` at every step, and whose policy makes none due: its job, its root, and its sidecar's directory."""

    def train(peer: Peer) -> list[int]:
        saved = []
        with checkpointer.Checkpointer(tmp_path / "run", policy={"trigger": {"periodSteps": 10**9}}) as opened:
            peer.tell(opened._session.runtime_dir)
            for step in range(1, 10**6):
                if opened.due(step):
                    saved.append(opened.save({"w": torch.full((9,), float(step))}, step).step)
                if peer._pipe.poll(0.01):
                    break
        return saved

    job = ranks.start(train)
    return job, tmp_path / "run", job.hear(Deadline.STAGED)[0]


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object, status: Exit = Exit.WELL) -> tuple[str, str]:
    assert main.main(list(map(str, arguments))) == status
    said = capsys.readouterr()
    return said.out, said.err


def findings(capsys: pytest.CaptureFixture[str], *arguments: object, status: Exit = Exit.WELL) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(said_by(capsys, "doctor", *arguments, "-o", "json", status=status)[0])
    return found


def test_a_running_training_saves_when_a_person_asks(
    runtime: tuple[Job, Path, str], ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends when the checkpoint is committed, and names its step; the manifest says that somebody has asked for it."""
    job, root, folder = runtime
    out, _ = said_by(capsys, "save", root, "--runtime-dir", folder)
    [step] = json.loads(said_by(capsys, "ls", root, "-o", "json")[0])
    assert out == f"step {step['step']} of {root} is committed\n"
    assert step["cause"] == "OnDemand"
    said_by(capsys, "save", "--runtime-dir", folder)
    _, told = said_by(capsys, "save", root / "other", "--runtime-dir", folder, status=Exit.FOUND)
    assert f"no sidecar here saves to {root}/other; those that run save to {root}" in told

    told_by_doctor = findings(capsys, root, "--runtime-dir", folder)
    text = {each["check"]: each["what"] for each in told_by_doctor}
    assert f"root {root}" in text["sidecar"]
    assert "1 of 1 of this pod" in text["ranks"]
    assert "2 committed, 0 failed" in text["saves"]
    assert "uses the root" in text["owner"]
    assert "2 committed; a restart loads step" in text["checkpoints"]
    assert "takes" in text["storage"]
    assert {each["result"] for each in told_by_doctor if each["check"] != "shared memory"} == {"ok"}
    assert not list((root / ".pillion").glob("*.distcp"))

    job.say()
    assert len(job.finish()[0]) == 2
    ranks.alone()
    _, told = said_by(capsys, "save", root, "--runtime-dir", folder, status=Exit.UNREACHABLE)
    assert "no sidecar answers" in told


def test_a_training_that_never_asks_due_is_told_of_at_the_end_of_the_wait(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The request is open, no save has begun, and the text says what the script must do."""
    opened = ranks.open(tmp_path / "run")
    folder = opened._session.runtime_dir
    _, told = said_by(capsys, "save", "--runtime-dir", folder, "--wait", "0.3", status=Exit.FOUND)
    assert "no save was committed within 0.3 s" in told
    assert "due(step)" in told


def test_the_doctor_says_what_a_restart_would_find(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged manifest is a problem, a save without a commit a warning, a root that cannot be written a problem."""
    root = tmp_path / "run"
    opened = ranks.open(root)
    for step in (1, 2):
        opened.save({"w": torch.ones(9)}, step).result(Deadline.COMMITTED.s)
    opened.close()
    ranks.alone()
    monkeypatch.setenv("PILLION_RUNTIME_DIR", str(tmp_path / "none"))
    (root / "step-1" / "pillion-manifest.json").write_bytes(b"{")
    (root / "step-3").mkdir()
    found = findings(capsys, root, status=Exit.FOUND)
    checkpoints = {each["result"]: each["what"] for each in found if each["check"] == "checkpoints"}
    assert checkpoints["ok"].startswith("2 committed; a restart loads step 2")
    assert checkpoints["problem"] == "step 1 is damaged: its manifest cannot be read"
    assert checkpoints["warning"].startswith("step 3 has no commit")
    assert [each["what"] for each in found if each["check"] == "owner"] == ["no training uses the root"]
    (tmp_path / "file").write_text("")
    [storage] = [
        each for each in findings(capsys, tmp_path / "file" / "x", status=Exit.FOUND) if each["check"] == "storage"
    ]
    assert storage["result"] == "problem"
    assert f"{tmp_path}/file" in storage["what"]


POD: dict[str, Any] = {
    "metadata": {
        "name": "llm-0",
        "labels": {"batch.kubernetes.io/job-completion-index": "0"},
        "annotations": {
            "pillion.dev/status": json.dumps(
                {"job_id": "llm", "policy": "gold", "image": "sidecar:1", "warnings": ["the arena is small"]}
            )
        },
    },
    "status": {
        "phase": "Running",
        "initContainerStatuses": [{"name": "pillion-sidecar", "restartCount": 2, "state": {"running": {}}}],
    },
}
OBJECTS: dict[str, list[dict[str, Any]]] = {
    "pods": [POD],
    "checkpoints.pillion.dev": [
        {
            "spec": {"jobID": "llm"},
            "status": {"step": 7, "path": "/checkpoints/llm/step-7", "completionTime": "2026-01-01T00:00:00Z"},
        },
        {"spec": {"jobID": "other"}, "status": {"step": 9, "completionTime": "2026-01-02T00:00:00Z"}},
    ],
    "checkpointpolicies.pillion.dev": [
        {
            "metadata": {"name": "gold"},
            "status": {
                "conditions": [{"type": "Valid", "status": "False", "reason": "PolicyInvalid", "message": "no"}]
            },
        }
    ],
    "events": [
        {
            "type": "Warning",
            "involvedObject": {"name": "llm-0"},
            "reason": "SaveFailed",
            "message": "step 8: disk\nfull",
            "lastTimestamp": "2026-01-01T00:00:00Z",
        },
        {"type": "Warning", "involvedObject": {"name": "another"}, "reason": "X", "message": "y"},
    ],
}


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, which answers with recorded objects and notes its arguments; returns the file of the notes."""
    for name, items in OBJECTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"items": items}))
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    notes = tmp_path / "calls"
    program.write_text(f'#!/bin/sh\necho "$@" >> {notes}\n[ "$1" = annotate ] || cat {tmp_path}/"$2".json\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return notes


def test_the_doctor_reads_a_jobs_objects_through_kubectl(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own pods, policy, checkpoints and warnings, and no other job's."""
    found = findings(capsys, "--cluster", "training/llm", status=Exit.FOUND)
    assert [(each["check"], each["result"]) for each in found] == [
        ("pod", "warning"),
        ("pod", "warning"),
        ("policy", "problem"),
        ("checkpoints", "ok"),
        ("event", "warning"),
    ]
    text = "\n".join(each["what"] for each in found)
    assert "llm-0 is Running; sidecar running, 2 restarts, image sidecar:1" in text
    assert "Valid is False, PolicyInvalid: no" in text
    assert "1; the newest is step 7" in text
    assert "SaveFailed: step 8: disk full" in text
    assert "get pods -l pillion.dev/injected=true -n training -o json" in kubectl.read_text()


def test_a_job_without_injected_pods_is_a_problem(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text asks for the annotation that opts in."""
    found = findings(capsys, "--cluster", "training/none", status=Exit.FOUND)
    assert "does its template have pillion.dev/policy?" in found[0]["what"]


def test_a_save_in_a_cluster_is_an_annotation(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a running pod, with a new value each time."""
    before = time.time()
    out, _ = said_by(capsys, "save", "--cluster", "training/llm")
    assert "requested a save of training/llm on pod llm-0" in out
    call = kubectl.read_text().splitlines()[-1].split()
    assert call[:5] == ["annotate", "pod", "llm-0", "-n", "training"]
    name, _, value = call[5].partition("=")
    assert name == "pillion.dev/save-now"
    assert int(value.split("-")[0]) >= int(before)
    _, told = said_by(capsys, "save", "--cluster", "training/none", status=Exit.FOUND)
    assert "no running pod of training has the job id none" in told
    _, told = said_by(capsys, "save", "--cluster", "llm", status=Exit.USAGE)
    assert "NAMESPACE/JOB is allowed" in told


def test_a_cluster_that_refuses_is_named(tmp_path: Path, kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kubectl's own words."""
    (tmp_path / "bin" / "kubectl").write_text("#!/bin/sh\necho 'Error: pods is forbidden' >&2\nexit 1\n")
    _, told = said_by(capsys, "doctor", "--cluster", "a/b", status=Exit.UNREACHABLE)
    assert "kubectl get pods: Error: pods is forbidden" in told
