"""
The whole of: the chart installed on a test cluster, through helm, as a platform team does it.

Called from: the fixtures of the level cluster, the cluster's demo.
Must never: change an installed object behind helm's back, but for the namespace that it makes.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from support.deadlines import Deadline
from support.kube import Kube

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts" / "pillion"
NAME: Final = "pillion"
NAMESPACE: Final = "pillion-system"
VALUES: Final = {
    "image": {"repository": "localhost/pillion/operator", "tag": "test", "pullPolicy": "Never"},
    "sidecar": {"image": {"repository": "localhost/pillion/sidecar", "tag": "test", "pullPolicy": "Never"}},
    "monitoring": {"jobSeries": True},
}
"""Values: the images that the harness builds and brings to the nodes, and the series of jobs, which stories read."""


class HelmFailed(AssertionError):
    """helm refused; the text is what it said."""


@dataclass(frozen=True, slots=True)
class Release:
    """The release `pillion` on one cluster."""

    helm: Path
    kube: Kube
    """In the release's namespace."""

    def run(self, *arguments: str, given: str | None = None, deadline: Deadline = Deadline.ROLLED_OUT) -> str:
        """
        Run helm.

        Raises:
            HelmFailed: it refused, or did not end in time.
        """
        command = [str(self.helm), f"--kubeconfig={self.kube.kubeconfig}", f"--namespace={NAMESPACE}", *arguments]
        try:
            done = subprocess.run(
                command, input=given, capture_output=True, text=True, check=False, timeout=deadline.s + 30
            )
        except subprocess.TimeoutExpired as err:
            raise HelmFailed(f"helm {' '.join(arguments)}: not done in time\n{self.kube.describe()}") from err
        if done.returncode:
            text = f"helm {' '.join(arguments)}: {done.stderr.strip()}"
            raise HelmFailed(f"{text}\n{self.kube.describe()}")
        return done.stdout

    def install(self, values: Mapping[str, Any] | None = None, *, chart: Path = CHART) -> None:
        """Install or upgrade, and wait until its Deployments are available. Blocks: up to Deadline.ROLLED_OUT."""
        self.run(
            *("upgrade", "--install", NAME, str(chart), "--create-namespace", "--wait", "--values=-"),
            f"--timeout={Deadline.ROLLED_OUT.s:.0f}s",
            given=json.dumps(_merged(VALUES, values or {})),
        )

    def uninstall(self) -> None:
        """Uninstall, and wait until its objects are gone."""
        self.run("uninstall", NAME, "--wait", "--ignore-not-found", f"--timeout={Deadline.ROLLED_OUT.s:.0f}s")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        mine = result.get(key)
        result[key] = _merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return result
