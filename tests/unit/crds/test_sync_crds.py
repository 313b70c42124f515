"""
The whole of: how a CRD becomes a template of the chart.

Called from: pytest.
Must never: need helm; what is rendered is tested where helm is, in tests/chart.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml


def _tool() -> ModuleType:
    # tools/ is on nobody's path: its programs are run, not imported.
    path = Path(__file__).parents[3] / "tools" / "sync_crds.py"
    spec = importlib.util.spec_from_file_location("sync_crds", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sync_crds = _tool()


@pytest.mark.parametrize("path", sorted(sync_crds.SOURCE.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_template_is_its_crd_and_a_wrapping(path: Path) -> None:
    """Without Helm's lines, and the annotations that they put in, the template is the CRD, byte for byte."""
    text = sync_crds.template(path.read_text())
    assert text.startswith(sync_crds.HEAD)
    assert text.endswith(sync_crds.TAIL)
    plain = text.removeprefix(sync_crds.HEAD).removesuffix(sync_crds.TAIL).replace(sync_crds.KEEP, "")
    assert plain == path.read_text()
    kept = "".join(line for line in text.splitlines(keepends=True) if "{{" not in line)
    assert yaml.safe_load(kept)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize(
    "crd",
    [
        "\nmetadata:\n  name: {{ x }}\nspec:\n",
        "kind: X\n",
        "\nmetadata:\n  annotations: {}\nspec:\n",
        "\nmetadata:\n\nmetadata:\n",
    ],
)
def test_what_cannot_be_wrapped_is_said(crd: str) -> None:
    """A CRD that Helm would render, or with no place for annotations, is refused instead of being broken."""
    with pytest.raises(ValueError):
        sync_crds.template(crd)
