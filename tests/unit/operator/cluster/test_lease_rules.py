"""
The whole of: when a lease may be taken.

Called from: pytest.
"""

from hypothesis import given
from hypothesis import strategies as st

from pillion_operator.cluster import lease
from pillion_operator.cluster.lease import Record

SECONDS = st.floats(0, 1000)


def record(holder: str, lifetime_s: float = 15.0) -> Record:
    return Record(holder=holder, lifetime_s=lifetime_s, renewed="2026-11-24T12:00:00.000000Z")


@given(SECONDS, SECONDS, st.floats(1, 100))
def test_another_holder_is_followed_after_its_lifetime_only(seen_s: float, later_s: float, lifetime_s: float) -> None:
    """A lease that another holds is free once it has not changed for its own lifetime, by our clock, and not a moment before."""
    now_s = seen_s + later_s
    found = lease.is_free(record("other", lifetime_s), identity="mine", seen_s=seen_s, now_s=now_s)
    assert found == (now_s - seen_s > lifetime_s)


@given(SECONDS)
def test_a_lease_of_nobody_or_of_ours_is_free_at_once(now_s: float) -> None:
    """What was released, and what a process of this pod held before it was started anew, need not be waited for."""
    for holder in ("", "mine"):
        assert lease.is_free(record(holder), identity="mine", seen_s=now_s, now_s=now_s)


def test_a_holder_gives_up_before_another_may_take_over() -> None:
    """Between the moment that a holder gives up and the first at which another may begin, there is time for what is in flight."""
    assert lease.RENEW_S < lease.RENEW_DEADLINE_S < lease.LIFETIME_S
    assert lease.RENEW_DEADLINE_S + lease.REQUEST_TIMEOUT_S < lease.LIFETIME_S
