"""
The whole of: where, and by what, a trainer in a pod may have its saves written.

Called from: pytest.
"""

import pytest

from pillion.errors import UsageError
from pillion.wire import policy
from pillion.wire.save_messages import Destination, NamedWriter
from pillion_sidecar.supervisor import destinations

ROOT = "/pillion/storage/team/job-a"
OWN = policy.Writer(name="company.writers:Bucket", arguments={"bucket": "team"})
NAMED = NamedWriter(name="company.writers:Bucket", arguments={"bucket": "team"})


@pytest.mark.parametrize(
    "destination",
    [
        Destination(path=f"{ROOT}/mine", overwrite=True),
        Destination(path=f"{ROOT}/deep/er", overwrite=False),
        Destination(path=f"{ROOT}/..mine"),
        Destination(path=f"{ROOT}/step-9", writer=NAMED),
        Destination(writer=NAMED),
    ],
    ids=["a folder", "a folder within", "a name of dots", "by the policy's writer", "where the policy's writer says"],
)
def test_a_pods_trainer_saves_below_its_jobs_root(destination: Destination) -> None:
    """A directory below the job's own, written by Pillion or by the policy's writer as the policy calls it, is taken."""
    destinations.check(destination, root=ROOT, writer=OWN)


@pytest.mark.parametrize(
    "path",
    [
        "/pillion/storage/team/job-b/step-9",
        f"{ROOT}/../job-b/step-9",
        f"{ROOT}x/step-9",
        ROOT,
        f"{ROOT}/",
        f"{ROOT}/.pillion/owner",
        "relative/step-9",
        "s3://other/bucket",
        "/",
    ],
)
def test_a_directory_outside_the_jobs_root_is_neither_written_nor_read(path: str) -> None:
    """Neither another job's directory, nor the root itself or what Pillion keeps in it, nor a place that is no directory."""
    for named in (None, NAMED):
        with pytest.raises(UsageError, match="is not below"):
            destinations.check(Destination(path=path, writer=named), root=ROOT, writer=OWN)
    with pytest.raises(UsageError, match="read from the job's own directory"):
        destinations.check_source(path, root=ROOT)


@pytest.mark.parametrize(
    "named",
    [
        NamedWriter(name="os:system", arguments={"command": "id"}),
        NamedWriter(name=OWN.name, arguments={"bucket": "others"}),
        NamedWriter(name=OWN.name),
    ],
    ids=["any callable", "other arguments", "no arguments"],
)
@pytest.mark.parametrize("own", [OWN, None], ids=["the policy has one", "the policy has none"])
def test_a_writer_that_is_not_the_policys_own_is_refused(named: NamedWriter, own: policy.Writer | None) -> None:
    """What runs beside the storage's credentials is the policy's word, and no message of a trainer's."""
    with pytest.raises(UsageError, match=r"is not the policy's: .*storage\.writer"):
        destinations.check(Destination(path=f"{ROOT}/mine", writer=named), root=ROOT, writer=own)
