"""
The texts of errors that name ranks: whole for a few, and short for thousands.

Called from: pytest.
"""

from pillion.errors import BarrierTimeout, ErrorDocument, PersistError, RemoteFailure, SaveError


def test_a_few_ranks_are_all_named_with_their_causes() -> None:
    """As many as a person reads."""
    failures = {3: RemoteFailure("OSError", "disk"), 1: RemoteFailure("OSError", "disk"), 2: RemoteFailure("X", "why")}
    assert str(PersistError("step 7 was not saved", step=7, failures=failures)) == (
        "step 7 was not saved [ranks [1, 3]: OSError: disk; rank 2: X: why]"
    )
    assert "ranks [2, 5] did not arrive at 'p' within 1.0 s" in str(
        BarrierTimeout(phase="p", missing=[2, 5], waited_s=1)
    )


def test_thousands_of_ranks_make_a_line_that_can_be_read() -> None:
    """One cause of all, and one of each: neither makes a log of a hundred kilobytes, and the failures have every rank."""
    missing = range(1, 2048)
    alike = {rank: RemoteFailure("BarrierTimeout", "did not arrive") for rank in missing}
    error = BarrierTimeout(phase="save/1", missing=list(missing), waited_s=30.0, failures=alike)
    assert len(str(error)) < 400
    assert "and 2,031 more" in str(error)
    each = {rank: RemoteFailure("OSError", f"{rank} is full") for rank in missing}
    other = PersistError("step 7 was not saved", failures=each)
    assert len(str(other)) < 400
    assert str(other).endswith("rank 8: OSError: 8 is full; and 2,039 more causes]")
    assert other.failures == each


def test_a_failure_of_many_ranks_crosses_a_process_with_its_text_once() -> None:
    """The causes are appended again by the receiver, so they do not travel in the text."""
    for failures in ({0: RemoteFailure("A", "b")}, {rank: RemoteFailure("A", "b") for rank in range(40)}):
        document = ErrorDocument.from_exception(PersistError("step 7 was not saved", step=7, failures=failures))
        assert document.message == "step 7 was not saved"
        back = document.to_exception(step=7)
        assert isinstance(back, SaveError)
        assert str(back).count("A: b") == 1
        assert back.failures == failures
