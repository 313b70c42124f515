"""
`pillion save`: asks a running job to save now, and waits for the outcome. Called from: `cli.main`.

On this machine the request goes to the sidecar's control socket. In a cluster it is the annotation `pillion.dev/save-now`, which the controller
answers with events.
"""

from __future__ import annotations

import argparse
import os
import secrets
import time
from typing import Final

from pillion import connection
from pillion.wire import control, home
from pillion_sidecar.cli import kubernetes, output, sidecars
from pillion_sidecar.cli.exits import Ended, Exit

DEFAULT_WAIT_S: Final = 600.0
"""Default timeout for the outcome: the trainers have 300 s to begin a save, and large states take minutes."""
POLL_S: Final = 0.2
"""Pause between two looks at the sidecar."""


def run(arguments: argparse.Namespace) -> Exit:
    """Request a save. FOUND: it was not committed."""
    if arguments.cluster:
        return _in_cluster(arguments)
    found = sidecars.of_root(sidecars.find(os.environ, arguments.runtime_dir), arguments.job or "")
    request = control.RequestSave(request=f"cli-{secrets.token_hex(8)}")
    deadline = time.monotonic() + arguments.wait
    announced = -1
    while True:
        answer = connection.ask(found.socket, request, sidecars.ANSWER_TIMEOUT_S)
        if isinstance(answer, control.Failed):
            raise Ended(Exit.UNREACHABLE, str(answer.error.get("message", answer.error)))
        if answer.progress == home.Progress.DONE:
            root = found.status.root if found.status is not None else ""
            output.show(f"step {answer.step} of {root} is committed\n")
            return Exit.WELL
        if answer.progress == home.Progress.FAILED:
            raise Ended(Exit.FOUND, f"no checkpoint was saved: {answer.message}")
        if answer.step >= 0 and answer.step != announced:
            announced = answer.step
            output.say(f"pillion: step {answer.step} is being saved")
        if time.monotonic() > deadline:
            raise Ended(
                Exit.FOUND,
                f"no save was committed within {arguments.wait:g} s (--wait); the request stays open. A script saves only where it calls due(step)",
            )
        time.sleep(POLL_S)


def _in_cluster(arguments: argparse.Namespace) -> Exit:
    namespace, name = kubernetes.parse(arguments.job or "")
    job = kubernetes.read(namespace, name)
    running = [each for each in job.pods if each.get("status", {}).get("phase") == "Running"]
    if not running:
        raise Ended(Exit.FOUND, f"no running pod of {namespace} has the job id {name}, with Pillion's sidecar in it")
    pod = min(running, key=_index)["metadata"]["name"]
    value = f"{int(time.time())}-{secrets.token_hex(4)}"
    kubernetes.call("annotate", "pod", pod, "-n", namespace, f"{kubernetes.SAVE_NOW_ANNOTATION}={value}", "--overwrite")
    output.show(f"requested a save of {namespace}/{name} on pod {pod}; its events tell the outcome:\n")
    output.show(f"  kubectl get events -n {namespace} --field-selector involvedObject.name={pod}\n")
    return Exit.WELL


def _index(pod: kubernetes.Object) -> tuple[int, str]:
    labels = pod["metadata"].get("labels", {})
    index = str(labels.get("batch.kubernetes.io/job-completion-index", ""))
    return int(index) if index.isdecimal() else 0, pod["metadata"]["name"]
