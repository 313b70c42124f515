"""
The whole of: which policy a run without a cluster has, in each form that it may be given, and where its writer is looked for.

Called from: pytest.
Must never: start a sidecar. A YAML file is read by a process of its own, as the trainer may lack YAML.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pillion import policy_source, store_mode
from pillion.errors import SettingsError, UsageError
from pillion.wire import policy

SPEC: dict[str, Any] = {"store": "Own", "trigger": {"periodSteps": 5}}
WHOLE: dict[str, Any] = {
    "apiVersion": policy.API_VERSION,
    "kind": policy.KIND,
    "metadata": {"name": "llm"},
    "spec": SPEC,
}


def test_the_store_of_a_policy_counts_in_every_form_that_it_is_given_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping, a whole object, JSON text and a YAML file, as an argument or as PILLION_POLICY."""
    (tmp_path / "policy.yaml").write_text("# comments are YAML's\nstore: Own\ntrigger: {periodSteps: 5}\n")
    (tmp_path / "policy.json").write_text(json.dumps(WHOLE))
    monkeypatch.chdir(tmp_path)
    expected = policy.dump(policy.parse(SPEC, embedded=True))
    assert expected["store"] == "Own"
    assert store_mode.policy_of_all(SPEC, {}) == expected
    assert store_mode.policy_of_all(WHOLE, {}) == expected
    assert store_mode.policy_of_all(Path("policy.yaml"), {}) == expected
    assert store_mode.policy_of_all(None, {"PILLION_POLICY": "policy.json"}) == expected
    assert store_mode.policy_of_all(None, {"PILLION_POLICY": json.dumps(SPEC)}) == expected
    assert store_mode.policy_of_all(SPEC, {"PILLION_POLICY": "{}"}) == expected, "the argument wins"
    assert store_mode.policy_of_all(None, {}) is None


@pytest.mark.parametrize("bad", [{"store": "Mine"}, "no-such-file.yaml", '{"store": ', "[1]"])
def test_a_policy_that_cannot_be_read_is_no_error_before_the_ranks_have_met(bad: Any) -> None:
    """The others wait for this rank in the next line: the error is that of opening the session."""
    assert store_mode.policy_of_all(bad, {}) is None


def test_a_path_is_sent_absolute_and_a_wrong_mapping_is_told_at_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sidecar's working directory is another one."""
    monkeypatch.chdir(tmp_path)
    assert policy_source.document("policy.yaml", {}) == os.path.join(tmp_path, "policy.yaml")
    assert policy_source.document(None, {"PILLION_POLICY": "p.json"}) == os.path.join(tmp_path, "p.json")
    assert policy_source.document(None, {"PILLION_POLICY": " {}"}) == " {}"
    assert policy_source.document(None, {}) is None
    with pytest.raises(SettingsError, match=r"store"):
        policy_source.document({"store": "Mine"}, {})


def test_a_writer_that_cannot_be_found_is_refused_before_anything_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module beside the script is found as the script finds it; in a pod the sidecar's own image decides."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "beside_the_script.py").touch()
    policy_source.require_module("beside_the_script:Writer")
    for name in ("no_such_module:Writer", "no_such_package.module:Writer", "__main__:Writer"):
        with pytest.raises(UsageError):
            policy_source.require_module(name)
    lost = {"storage": {"writer": {"name": "no_such_module:Writer"}}}
    with pytest.raises(SettingsError, match=r"storage\.writer\.name='no_such_module:Writer'.*sys\.path"):
        policy_source.document(lost, {})
    assert policy_source.document(lost, {"PILLION_RUNTIME_DIR": "/pillion/arena"}) == lost
