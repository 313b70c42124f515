"""
The whole of: a sidecar as injection starts it: `pillion-sidecar run` with everything in its environment, in a runtime directory
that it shares with trainers of this test.

Called from: tests of the levels `process` and `distributed`.
Must never: pass a setting that the injector does not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from pillion import connection
from pillion.errors import SidecarUnavailable
from pillion.wire import control, names
from pillion.wire.message import Message
from support import deadlines
from support.deadlines import Deadline
from support.processes import Processes, Run


@final
class Injected:
    """
    One pod's sidecar, and what its trainers' environment is.

    Blocks: until it listens, up to Deadline.PROCESS_START.
    """

    def __init__(
        self,
        processes: Processes,
        folder: Path,
        root: Path,
        *,
        policy: Mapping[str, Any] | None = None,
        pod: str = "a",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._processes = processes
        spec = {"staging": {"sizeLimit": "64Mi"}, **(policy or {})}
        self.trainer = {
            names.ENV_RUNTIME_DIR: str(folder),
            names.ENV_ROOT: str(root),
            names.ENV_RUN_ID: root.name,
            names.ENV_POD: pod,
        }
        self._env = {**self.trainer, names.ENV_POLICY: json.dumps(spec), **(env or {})}
        self.start()

    def start(self) -> None:
        """
        Starts it (again, after it was killed).
        """
        self.run: Run = self._processes.python("-m", "pillion_sidecar", "run", env=self._env)
        deadlines.eventually(self.answers, Deadline.PROCESS_START, "the sidecar answers")

    def answers(self) -> bool:
        """
        Whether it answers a ping.
        """
        assert self.run.popen.poll() is None, self.run.tail()
        try:
            return bool(self.ask("ping")["pid"] == self.run.pid)
        except SidecarUnavailable:
            return False

    def ask(self, message: str) -> dict[str, Any]:
        """
        What it answers to an observer.
        """
        request: Any = control.OBSERVED[message]()
        answer: Message = connection.ask(str(self.folder / names.CONTROL_SOCKET), request, Deadline.REPLY.s)
        return answer.to_document()

    def saves(self) -> dict[int, str]:
        """
        step -> state of its save.
        """
        return {save["step"]: save["state"] for save in self.ask("status")["saves"]}
