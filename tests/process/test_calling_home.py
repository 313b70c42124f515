"""
The whole of: a sidecar that calls home: what it reports, what it does with the answers, and that training never notices when nobody
answers.

Called from: pytest.
Must never: depend on when a report comes; only on what one says that comes after something happened.
"""

import dataclasses
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pillion import checkpointer
from pillion.wire import home, names
from process.injected import Injected
from process.ranks import Body, Peer, Ranks, committed
from support import controller as controllers
from support import deadlines
from support.controller import Controller
from support.deadlines import Deadline
from support.processes import Processes


@pytest.fixture
def controller(tmp_path: Path, nothing_left: str) -> Iterator[Controller]:
    with controllers.listening(tmp_path / "controller") as listening:
        yield listening


def steps_until_told(pause_s: float = 0.01) -> Body:
    """A trainer that saves what is due at each step until it hears something, then waits for its saves; the steps it saved."""

    def train(peer: Peer) -> list[int]:
        opened = checkpointer.Checkpointer()
        step, saved = 0, []
        peer.tell()
        while not peer._pipe.poll(pause_s):
            step += 1
            if opened.due(step):
                saved.append(step)
                opened.save({"w": torch.full((1000,), float(step))}, step)
        opened.wait(Deadline.COMMITTED.s)
        opened.close()
        return saved

    return train


def asks(controller: Controller, *ids: str) -> None:
    commands = tuple(home.Command(id=each) for each in ids)
    controller.answer = dataclasses.replace(controller.answer, commands=commands)


def says(controller: Controller, generation: int, **spec: Any) -> None:
    controller.answer = dataclasses.replace(controller.answer, policy=spec, policy_generation=generation)


def acknowledged(report: home.Report, command: str) -> home.Acknowledgement | None:
    return next((each for each in report.acknowledgements if each.id == command), None)


def test_a_report_says_who_it_is_from_and_what_is_on_storage(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Before the first hello, after a commit and after the goodbye; over one connection, with the token of the file."""
    env = controller.env(**{names.ENV_POD: "uid-1"})
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=env)
    idle = controller.hears("of the idle job", lambda report: True)
    assert (idle.namespace, idle.pod, idle.pod_uid, idle.policy) == ("team-a", "llm-0", "uid-1", "llm")
    assert (idle.job_kind, idle.job_name, idle.job_id) == ("Job", "llm", "run")
    assert (idle.session, idle.step, idle.committed_step, idle.checkpoints, idle.listed) == ("", -1, -1, (), True)

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 3).result(Deadline.COMMITTED.s)
        opened.save({"w": torch.ones(1000)}, 4, persist=False).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()
        opened.close()

    job = ranks.start(train, env=sidecar.trainer)
    job.hear()
    heard = controller.hears(
        "of the commit", lambda report: report.committed_step == 3 and report.metrics["snapshots"] == 1
    )
    assert heard.step == 4
    assert (heard.world_size, heard.num_pods, len(heard.session)) == (1, 1, 32)
    (found,) = heard.checkpoints
    assert (found.step, found.path, found.world_size, found.cause) == (3, "run/step-3", 1, "Periodic")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "run" / "step-3").iterdir() if path.name.startswith("_"))
    assert found.size_bytes >= on_disk
    assert found.started < found.completed <= heard.snapshot_time
    assert heard.metrics["saves_committed"] == 1
    assert heard.metrics["stages"] == heard.metrics["stalls"] == 2
    controller.token_file.write_text("another-token")
    controller.hears_more()
    assert controller.tokens[-1] == "Bearer another-token"
    assert set(controller.requests) == {"POST /v1/report"}
    assert controller.connections == 1
    job.say()
    job.finish()
    # The goodbye persisted what was in memory only.
    heard = controller.hears("of the last commit", lambda report: report.committed_step == 4)
    assert [(each.step, each.cause) for each in heard.checkpoints] == [(4, "OnTermination"), (3, "Periodic")]
    assert controllers.TOKEN not in sidecar.run.stderr


def test_a_pin_of_the_cluster_keeps_a_step_from_retention_until_it_is_taken_back(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """The answer to a report sets it and removes it; the reports say so, and retention of the next commits acts on it."""
    policy = {"retention": {"keepLast": 1}, "trigger": {"onTermination": "Skip"}}
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env(), policy=policy)

    def train(peer: Peer) -> None:
        opened = checkpointer.Checkpointer()
        while (step := peer.hear()) is not None:
            opened.save({"w": torch.ones(10)}, step).result(Deadline.COMMITTED.s)
            peer.tell()
        opened.close()

    job = ranks.start(train, env=sidecar.trainer)
    [trainer] = job.trainers

    def save(step: int) -> None:
        trainer.say(step)
        trainer.hear()

    def changes(kind: home.CommandKind) -> None:
        made = (home.Command(id=f"{kind.value}-1", kind=kind.value, step=1),)
        controller.answer = dataclasses.replace(controller.answer, commands=made)

    save(1)
    changes(home.CommandKind.PIN)
    controller.hears("of the pin", lambda report: [each.pinned_by for each in report.checkpoints] == ["cluster"])
    for step in (2, 3):
        save(step)
    root = tmp_path / "run"
    deadlines.eventually(lambda: committed(root) == [1, 3], Deadline.SETTLE, "the pinned step and the newest stay")
    changes(home.CommandKind.UNPIN)
    controller.hears(
        "of no pin", lambda report: report.checkpoints and not any(c.pinned_by for c in report.checkpoints)
    )
    save(4)
    deadlines.eventually(lambda: committed(root) == [4], Deadline.SETTLE, "step 1 goes as any other")
    job.say(None)
    job.finish()


def test_a_save_that_is_asked_for_is_made_once_and_acknowledged(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Accepted, then Done with its step, as long as the command is repeated; the checkpoint's cause is the demand."""
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env())
    job = ranks.start(steps_until_told(), env=sidecar.trainer)
    job.hear()
    controller.hears("of the session", lambda report: report.session)
    asks(controller, "one", "two")
    heard = controller.hears("that both are done", lambda report: _progress(report) == {"one": "Done", "two": "Done"})
    answer = acknowledged(heard, "one")
    assert answer is not None
    assert heard.committed_step == answer.step
    again = controller.hears_more(3)
    assert acknowledged(again, "one") == answer
    assert again.metrics["saves_committed"] == 1
    assert again.checkpoints[0].cause == "OnDemand"
    asks(controller)
    controller.hears("no acknowledgement any more", lambda report: not report.acknowledgements)
    # The same id once more, as after a restart of the controller: what became of it is told, and nothing is done.
    asks(controller, "one")
    assert controller.hears("of the first", lambda report: acknowledged(report, "one") == answer).committed_step
    job.say()
    assert job.finish() == [[answer.step]]


def _progress(report: home.Report) -> dict[str, str]:
    return {each.id: each.progress for each in report.acknowledgements}


def test_a_save_cannot_be_asked_of_trainers_that_are_not_there(
    controller: Controller, processes: Processes, tmp_path: Path
) -> None:
    """Without a connected trainer the demand fails at once, with the reason."""
    Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env())
    asks(controller, "one")
    heard = controller.hears("that it failed", lambda report: _progress(report) == {"one": "Failed"})
    assert "no trainer is connected" in heard.acknowledgements[0].message


def test_a_running_job_takes_up_when_to_save_and_what_to_keep(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """A period, a number of checkpoints to keep and a suspension reach the trainer while it runs, and the step to restore the next
    trainer of the pod; what needs a new pod is logged."""
    started_with = {"trigger": {"periodSteps": 1_000_000}, "drain": {"timeoutSeconds": 7}}
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", policy=started_with, env=controller.env())
    job = ranks.start(steps_until_told(), env=sidecar.trainer)
    job.hear()
    controller.hears("of the session", lambda report: report.session and report.policy_generation == 0)

    says(controller, 2, trigger={"periodSteps": 50}, retention={"keepLast": 2}, store="Own", staging={"slots": 3})
    controller.hears(
        "that the policy holds, and old ones are gone",
        lambda report: (
            report.policy_generation == 2 and report.metrics["saves_committed"] >= 4 and len(report.checkpoints) == 2
        ),
    )
    assert all(step % 50 == 0 for step in committed(tmp_path / "run"))
    assert "the policy's store changed: a running pod keeps its own until it is replaced" in sidecar.run.stderr

    says(controller, 3, trigger={"periodSteps": 50}, suspend=True)
    controller.hears("of the suspension", lambda report: report.policy_generation == 3)
    # One that was on its way may still come.
    before = controller.hears_more(2).metrics["saves_committed"]
    assert controller.hears_more(3).metrics["saves_committed"] <= before + 1
    asks(controller, "meanwhile")
    controller.hears("that a demand is met all the same", lambda report: _progress(report) == {"meanwhile": "Done"})

    says(controller, 3, triger={"periodSteps": 50})
    says(controller, 4, triger={"periodSteps": 50})
    controller.hears_more(2)
    assert "generation 4 of the policy cannot be used" in sidecar.run.stderr
    assert controller.reports[-1].policy_generation == 3

    older = min(committed(tmp_path / "run"))
    says(controller, 5, restore={"mode": "Step", "step": older}, suspend=True)
    controller.hears("of the step to restore", lambda report: report.policy_generation == 5)
    job.say()
    job.finish()

    def resume(_: Peer) -> tuple[int | None, float]:
        state = {"w": torch.zeros(1000)}
        with checkpointer.Checkpointer() as opened:
            return opened.load(state), float(state["w"][0])

    assert ranks.start(resume, env=sidecar.trainer).finish() == [(older, float(older))]


def test_a_sidecar_that_is_replaced_goes_on_under_the_policy_of_the_controller(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Its environment is of the pod's start; the first answer brings it up to date, and a trainer that kept going keeps its rule."""
    started_with = {"trigger": {"periodSteps": 1_000_000}}
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", policy=started_with, env=controller.env())
    job = ranks.start(steps_until_told(), env=sidecar.trainer)
    job.hear()
    says(controller, 2, trigger={"periodSteps": 50})
    controller.hears("of a commit", lambda report: report.committed_step > 0)
    sidecar.run.signal(signal.SIGKILL)
    sidecar.run.wait(Deadline.PROCESS_EXIT)
    sidecar.start()
    assert sidecar.ask("policy")["policy"]["trigger"]["periodSteps"] in (50, 1_000_000)
    controller.hears(
        "of a commit under the second sidecar",
        lambda report: report.policy_generation == 2 and report.metrics["saves_committed"] >= 2,
    )
    assert sidecar.ask("policy")["policy"]["trigger"]["periodSteps"] == 50
    job.say()
    saved = job.finish()[0]
    assert saved
    assert all(step % 50 == 0 for step in saved)


def test_training_never_notices_a_controller_that_is_away(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Saves are committed meanwhile; once it is back it hears of all of them, and the log said so once."""
    sidecar = Injected(
        processes, tmp_path / "arena", tmp_path / "run", policy={"trigger": {"periodSteps": 20}}, env=controller.env()
    )
    job = ranks.start(steps_until_told(), env=sidecar.trainer)
    job.hear()
    controller.hears("of a commit", lambda report: report.committed_step > 0)
    controller.stop()
    newest = max(committed(tmp_path / "run"))
    deadlines.eventually(
        lambda: (
            max(committed(tmp_path / "run")) > newest + 20 and "cannot report to the controller" in sidecar.run.stderr
        ),
        Deadline.COMMITTED,
        "saves are committed meanwhile",
    )
    controller.start()
    heard = controller.hears("of them", lambda report: report.committed_step > newest + 20)
    assert newest in [each.step for each in heard.checkpoints]
    assert sidecar.run.stderr.count("cannot report to the controller") == 1
    deadlines.eventually(
        lambda: "the controller is reachable again" in sidecar.run.stderr, Deadline.REPLY, "the log says so"
    )
    job.say()
    job.finish()


@pytest.mark.parametrize("status", [307, 401, 403, 503])
def test_a_refusal_is_logged_and_a_redirect_is_not_followed(
    controller: Controller, processes: Processes, tmp_path: Path, status: int
) -> None:
    """Whatever the controller answers but 200, the sidecar asks again later, here and nowhere else."""
    with controllers.listening(tmp_path / "other") as other:
        controller.status, controller.location = status, f"https://127.0.0.1:{other.port}/v1/report"
        sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env())
        deadlines.eventually(lambda: len(controller.requests) >= 2, Deadline.REPLY, "it asked twice")
        assert f"cannot report to the controller: {status}" in sidecar.run.stderr
        controller.status = 200
        controller.hears("the sidecar", lambda report: True)
        assert other.requests == []
        assert controllers.TOKEN not in sidecar.run.stderr


def test_a_server_that_it_does_not_trust_gets_no_token(
    controller: Controller, processes: Processes, tmp_path: Path
) -> None:
    """Another authority's certificate ends the call before a byte of the report is sent."""
    ca = controllers.certificate(tmp_path)
    env = controller.env(**{names.ENV_HOME_CA: ca})
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=env)
    deadlines.eventually(
        lambda: "CERTIFICATE_VERIFY_FAILED" in sidecar.run.stderr, Deadline.REPLY, "the certificate is not trusted"
    )
    assert controller.requests == []


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        (names.ENV_HOME_CA, "no certificate", "this sidecar cannot report to the controller: no certificate"),
        (names.ENV_TOKEN_FILE, "/nowhere/token", "/nowhere/token cannot be read: No such file"),
    ],
)
def test_what_is_wrong_with_calling_home_does_not_keep_the_sidecar_from_working(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path, setting: str, value: str, told: str
) -> None:
    """It says what is wrong, and serves its trainer."""
    env = controller.env(**{setting: value})
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=env)

    def train(_: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 1).result(Deadline.COMMITTED.s)
        opened.close()

    ranks.start(train, env=sidecar.trainer).finish()
    assert told in sidecar.run.stderr


def test_a_token_that_is_none_is_never_shown(controller: Controller, processes: Processes, tmp_path: Path) -> None:
    """A file with a line break in the middle would be an error of the HTTP client, with the token in its text."""
    controller.token_file.write_text("secret-part\nother-part")
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env())
    deadlines.eventually(lambda: "holds no token" in sidecar.run.stderr, Deadline.REPLY, "the file is refused")
    assert "secret-part" not in sidecar.run.stderr


def test_the_last_commit_is_told_before_the_end(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """SIGTERM right after the goodbye: the controller hears of the last commit, though its next report was far off."""
    controller.answer = home.Answer(interval_s=60.0)
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env())
    controller.hears("of the idle job", lambda report: True)

    def train(_: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 1)
        opened.close()

    ranks.start(train, env=sidecar.trainer).finish()
    sidecar.run.signal(signal.SIGTERM)
    assert sidecar.run.wait(Deadline.ENDED_AT_ONCE) == 0
    assert controller.reports[-1].committed_step == 1
    assert controller.reports[-1].draining or len(controller.reports) == 2


def test_a_controller_that_is_away_does_not_hold_up_the_end(
    controller: Controller, processes: Processes, tmp_path: Path
) -> None:
    """Nobody answers: the sidecar does not wait for the controller at its end."""
    controller.stop()
    sidecar = Injected(processes, tmp_path / "arena", tmp_path / "run", env=controller.env())
    deadlines.eventually(
        lambda: "cannot report to the controller" in sidecar.run.stderr, Deadline.REPLY, "it has tried"
    )
    sidecar.run.signal(signal.SIGTERM)
    assert sidecar.run.wait(Deadline.ENDED_AT_ONCE) == 0


def test_a_storage_that_cannot_be_used_is_told_and_so_is_its_return(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """A root that is no directory: listing and saves fail, with reasons; when it is one again, that is told as well."""
    root = tmp_path / "run"
    sidecar = Injected(processes, tmp_path / "arena", root, env=controller.env())

    def train(peer: Peer) -> str:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 1).result(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()
        error = opened.save({"w": torch.ones(1000)}, 2).committed.exception(Deadline.COMMITTED.s)
        peer.tell()
        peer.hear()
        opened.save({"w": torch.ones(1000)}, 3).result(Deadline.COMMITTED.s)
        opened.close()
        return type(error).__name__

    job = ranks.start(train, env=sidecar.trainer)
    job.hear()
    controller.hears("of the commit", lambda report: report.listed and report.committed_step == 1)
    root.rename(tmp_path / "away")
    root.write_text("in the way")
    heard = controller.hears("that it cannot be listed", lambda report: not report.listed)
    assert "cannot be listed: Not a directory" in heard.storage_error
    assert heard.checkpoints == ()
    assert heard.committed_step == 1
    job.say()
    job.hear()
    heard = controller.hears("of the failure", lambda report: report.failures)
    assert [(each.step, each.reason) for each in heard.failures] == [(2, "PersistError")]
    root.unlink()
    (tmp_path / "away").rename(root)
    heard = controller.hears("that it can be listed", lambda report: report.listed)
    assert "step 2 was not saved" in heard.storage_error
    job.say()
    assert job.finish() == ["PersistError"]
    heard = controller.hears("of the next commit", lambda report: report.committed_step == 3)
    assert (heard.storage_error, len(heard.checkpoints)) == ("", 2)


def test_the_prometheus_endpoint_has_the_fields_names(
    controller: Controller, processes: Processes, ranks: Ranks, tmp_path: Path
) -> None:
    """Every metric of the sidecar is there after a save; a second sidecar with the same port warns, and works."""
    port = str(controller.port)
    controller.stop()
    env = {names.ENV_METRICS_PORT: port}
    first = Injected(processes, tmp_path / "arena", tmp_path / "run", env=env)

    def train(_: Peer) -> None:
        opened = checkpointer.Checkpointer()
        opened.save({"w": torch.ones(1000)}, 7).result(Deadline.COMMITTED.s)
        opened.close()

    ranks.start(train, env=first.trainer).finish()
    second = Injected(processes, tmp_path / "arena2", tmp_path / "run", env=env)
    assert f"metrics endpoint disabled: cannot listen on port {port}" in second.run.stderr
    shown = subprocess.run(
        ["curl", "-sS", "--max-time", "10", f"http://127.0.0.1:{port}/metrics"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    values = dict(line.rsplit(" ", 1) for line in shown.splitlines() if not line.startswith("#"))
    assert float(values["pillion_last_committed_step"]) == 7
    assert float(values['pillion_saves_total{outcome="committed"}']) == 1
    for name in ("stage", "stall", "queue", "persist", "commit"):
        assert float(values[f"pillion_{name}_seconds_count"]) == 1
        assert float(values[f"pillion_{name}_seconds_sum"]) > 0
    kinds = [float(values[f'pillion_run_seconds{{kind="{kind}"}}']) for kind in home.RUN_KINDS]
    assert sum(kinds) > 0
    assert 0 < float(values["pillion_run_goodput_ratio"]) < 1
    assert float(values["pillion_run_attempts"]) == 1
    page = (Path(__file__).parents[2] / "docs" / "reference" / "metrics.md").read_text()
    listed = re.findall(r"^\| `(pillion_\w+)` \|", page.partition("## Sidecar")[2], flags=re.MULTILINE)
    assert len(listed) > 15
    assert sorted(listed) == sorted(re.findall(r"^# TYPE (pillion_\w+) ", shown, flags=re.MULTILINE))
    for outcome in ("skipped", "replaced", "waited", "failed"):
        assert f'pillion_saves_total{{outcome="{outcome}"}}' in values
