"""
The whole of: values that differ from rank to rank under one name are found and named.

Called from: pytest.
"""

from pillion.wire import layout, manifest
from pillion_sidecar.checkpoint import commit
from pillion_sidecar.executor.save import replicas


def item(fqn: str, size: int = 4, *, start: int = 0, length: int | None = None) -> layout.Item:
    return layout.Item(fqn, "float32", (size,), (start,), (size if length is None else length,))


def test_ranks_of_a_pod_are_compared_by_name_and_part() -> None:
    """The same part of one tensor, and opaque leaves of one name; shards of one tensor are no replicas."""
    first = layout.Layout((item("w"), item("s", 8, start=0, length=4)), ("rng", "lr"), {})
    second = layout.Layout((item("s", 8, start=4, length=4), item("w")), ("lr", "rng"), {})
    equal = [(first, ["a", "b", "r", "l"]), (second, ["c", "a", "l", "r"])]
    assert replicas.within(equal) == []
    assert replicas.within([(first, ["a", "b", "r", "l"]), (second, ["c", "other", "l", "another"])]) == ["rng", "w"]
    assert replicas.within(equal[:1]) == []


def test_pods_are_compared_by_a_sample_that_is_bounded() -> None:
    """Opaque leaves first, then whole tensors that are small; what differed within one pod is in the result too."""
    large = replicas.SAMPLED_BYTES // 4 + 1
    of = layout.Layout((item("w"), item("large", large), item("s", 8, start=0, length=4)), ("rng",), {})
    sample = replicas.sample([(of, ["a", "x", "y", "r"])])
    assert sample == {"rng": "r", "w": "a"}
    results = [{"differing": ["loader"], "sample": sample}, {"differing": [], "sample": {"rng": "q", "w": "a"}}, {}]
    assert replicas.across(results) == ["loader", "rng"]
    many = layout.Layout((), tuple(f"leaf{i}" for i in range(1000)), {})
    assert len(replicas.sample([(many, ["d"] * 1000)])) == replicas.MAX_SAMPLED


def test_the_manifest_names_them_and_is_as_before_where_there_are_none() -> None:
    """An earlier release reads it either way."""
    about = {"step": 1, "generation": "1", "run_id": "r", "world_size": 2, "plan_id": "p", "parts": [], "size_bytes": 0}
    plain = commit.make_manifest(**about, metadata=b"")  # type: ignore[arg-type]  # a mapping of all its fields
    named = commit.make_manifest(**about, metadata=b"", differing=["rng"], owner="Job a (u)")  # type: ignore[arg-type]  # as above
    assert b"differing" not in plain.encode()
    assert manifest.decode_manifest(plain.encode()).differing == ()
    assert manifest.decode_manifest(named.encode()).differing == ("rng",)
    owners = [manifest.decode_manifest(each.encode()).owner for each in (plain, named)]
    assert owners == ["", "Job a (u)"]
