"""
The whole of: the policies, the rights and the rule on docs/guide/object-stores.md are ones that a cluster and a cloud take.

Called from: pytest.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pillion.wire import policy
from pillion_operator.injection import storage_spec
from unit.crds import structural

PAGE: Final = (Path(__file__).parents[3] / "docs" / "guide" / "object-stores.md").read_text()
SPEC: Final = structural.schema_of(structural.read("checkpointpolicies"))["properties"]["spec"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_each_policy_is_valid(text: str) -> None:
    """The API server and Pillion take it as it stands."""
    document = yaml.safe_load(text)
    assert policy.parse(document, embedded=False).storage.object_store is not None
    assert structural.problems(SPEC, structural.defaulted(SPEC, document["spec"])) == []


@pytest.mark.parametrize("text", blocks("python"))
def test_each_script_is_python_and_its_policy_is_valid(text: str) -> None:
    """A reader can copy it: the code parses, and the policy in it is one of a run without a cluster."""
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign):
            policy.parse(ast.literal_eval(statement.value), embedded=True)  # raises what is wrong


def test_the_rights_are_those_that_the_sidecar_uses_and_no_other() -> None:
    """Listing below the namespace's folder, and reading, writing and removing objects there."""
    documents: list[dict[str, Any]] = [json.loads(text) for text in blocks("json")]
    trust, rights, rule = documents
    condition = trust["Statement"][0]["Condition"]["StringEquals"]
    assert condition["ISSUER:aud"] == storage_spec.AWS_AUDIENCE
    listing, objects = rights["Statement"]
    assert listing["Action"] == "s3:ListBucket"
    assert set(objects["Action"]) == {
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
    }
    folder = objects["Resource"].removeprefix("arn:aws:s3:::BUCKET/")
    assert listing["Condition"]["StringLike"]["s3:prefix"] == folder == "runs/NAMESPACE/*"
    assert rule["Rules"][0]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 1
