"""
Makes the chart's copy of the CRDs: ``python tools/sync_crds.py`` writes it, ``--check`` says whether it is in step.

The whole of: how a file of crds/ becomes a template of the chart. It is wrapped, and nothing in it is rendered: the values
`crds.enabled` and `crds.keep` decide whether it is there, and whether it outlives the chart.
Called from: people, after a change in crds/; the chart's tests, with ``--check``.
Must never: write anywhere but in the chart's own folder of CRDs.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = ROOT / "crds"
TARGET: Final = ROOT / "charts" / "pillion" / "templates" / "crds"

HEAD: Final = "{{- /* Made by tools/sync_crds.py from crds/. Do not edit. */}}\n{{- if .Values.crds.enabled }}\n"
TAIL: Final = "{{- end }}\n"
ANCHOR: Final = "\nmetadata:\n"
KEEP: Final = """\
  annotations:
    {{- if .Values.crds.keep }}
    helm.sh/resource-policy: keep
    {{- end }}
    {{- with .Values.crds.annotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
"""


def template(crd: str) -> str:
    """
    The chart's template of a CRD.

    Raises:
        ValueError: the file is not one that can be wrapped; it says why.
    """
    if "{{" in crd:
        raise ValueError("a CRD with {{ in it would be rendered by Helm")
    if crd.count(ANCHOR) != 1:
        raise ValueError("a CRD has one metadata, at the left margin")
    head, tail = crd.split(ANCHOR)
    if tail.split("\nspec:\n")[0].count("annotations:"):
        raise ValueError("a CRD has no annotations of its own here: the chart's are put in that place")
    return f"{HEAD}{head}{ANCHOR}{KEEP}{tail}{TAIL}"


def wanted() -> dict[Path, str]:
    """By path: each template, as it should be."""
    return {TARGET / path.name: template(path.read_text()) for path in sorted(SOURCE.glob("*.yaml"))}


def main() -> int:
    """Write, or check; the exit status is 1 when something is out of step."""
    parser = argparse.ArgumentParser(description="Make the chart's copy of the CRDs.")
    parser.add_argument("--check", action="store_true", help="write nothing; say what is out of step")
    check = parser.parse_args().check
    files = wanted()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    stray = [path for path in TARGET.glob("*.yaml") if path not in files]
    for path in [*stale, *stray]:
        print(f"{path.relative_to(ROOT)}: {'is out of step' if check else 'written' if path in files else 'removed'}")
    if check:
        return 1 if stale or stray else 0
    TARGET.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(files[path])
    for path in stray:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
