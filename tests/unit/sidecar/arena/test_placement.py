"""
The whole of: whether the ranks of a session are where those of the session before were.

Called from: pytest.
"""

import dataclasses

import pytest

from pillion.wire import control, messages
from pillion_sidecar.arena.pod_arena import Identity

HELLO = {
    "session": "a" * 32,
    "run_id": "r",
    "rank": 0,
    "world_size": 3,
    "pods": [[0], [1], [2]],
    "placement": "1" * 32,
}


def identity(**changes: object) -> Identity:
    return Identity.from_hello(control.Hello.from_document({**HELLO, **changes}), root="/r")


@pytest.mark.parametrize(
    "changes",
    [
        {"placement": "2" * 32},
        {"placement": "2" * 32, "rank": 1},
        {"placement": "", "rank": 1},
        {"placement": "2" * 32, "world_size": 2, "pods": [[0], [1]]},
    ],
    ids=["others changed places", "this pod too", "a client that says no placement", "a pod is gone"],
)
def test_a_rank_that_moved_is_noticed_in_every_pod(changes: dict[str, object]) -> None:
    """Also by a pod that keeps its own ranks: it must not go on while two others have to save what they hold."""
    assert identity(session="b" * 32, **changes).moved_from(identity())


def test_pods_that_come_back_as_they_were_have_not_moved() -> None:
    """Another session, attempt and store change nothing."""
    again = dataclasses.replace(
        identity(session="b" * 32), attempt=3, store=("10.0.0.2", 1), store_mode=control.MeetingStore.PREFIX
    )
    assert not again.moved_from(identity())


@pytest.mark.parametrize("placement", ["x", "1" * 31, "G" * 32, "1" * 64])
def test_a_malformed_placement_is_refused(placement: str) -> None:
    """It comes from whoever reaches the socket, and is written into the session's record."""
    with pytest.raises(messages.BadFrame, match="placement"):
        identity(placement=placement)
