"""
The whole of: the chart rendered by helm, without a cluster.

Called from: the tests of the level chart. Each set of values is rendered once in a run.
Must never: build helm or fetch anything; where helm is not, the test says so and is skipped.
"""

import functools
import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from support.deadlines import Deadline
from support.release import CHART, NAME, NAMESPACE, HelmFailed

VARIABLE: Final = "PILLION_HELM"
"""Names the helm to use."""
KUBERNETES: Final = "1.34.0"
"""Version of Kubernetes for which the chart is rendered and validated."""

Json = dict[str, Any]


def find() -> Path:
    """helm: the one that PILLION_HELM names, that of the PATH, or that of the cluster's cache; else the test is skipped."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if on_path := shutil.which("helm"):
        return Path(on_path)
    # Imported here: the harness is of no use to whoever has helm.
    cached: Path = importlib.import_module("cluster.harness.binaries").folder("helm") / "helm"
    if not cached.exists():
        pytest.skip(f"needs helm: on the PATH, in {VARIABLE}, or built for the cluster (make test-cluster)")
    return cached


def run(*arguments: str, given: str | None = None) -> str:
    """
    What helm prints.

    Raises:
        HelmFailed: it refused; the text is what it said.
    """
    done = subprocess.run(
        [str(find()), *arguments],
        input=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=Deadline.PROCESS_START.s,
    )
    if done.returncode:
        raise HelmFailed(done.stderr + done.stdout)
    return done.stdout


def render(values: Mapping[str, Any]) -> list[Json]:
    """
    The objects of the chart, those of `helm test` included. The same for all who ask: not to be changed.

    Raises:
        HelmFailed: the values were refused, or a template cannot be rendered.
    """
    return _render(json.dumps(values, sort_keys=True))


def one(objects: list[Json], kind: str, name: str) -> Json:
    """The object of that kind and name."""
    (found,) = [each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def of_kind(objects: list[Json], *kinds: str) -> list[Json]:
    """The objects of these kinds."""
    return [each for each in objects if each["kind"] in kinds]


@functools.cache
def _render(values: str) -> list[Json]:
    text = run(
        *("template", NAME, str(CHART), "-n", NAMESPACE, "--kube-version", KUBERNETES, "-f", "-"),
        given=values,
    )
    # The loader that is C: the CRDs are long.
    return [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each is not None]
