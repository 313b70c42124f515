"""
The whole of: what is written by one side of a contract and read by the other: frames, layouts, manifests, errors, slot headers.

Called from: pytest.
Must never: compare with a recorded text; both sides of the contract are ours and have to agree.
"""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion import errors
from pillion.wire import arena, layout, manifest, messages
from pillion.wire import names as wire_names

names = st.text(max_size=12)
numbers = st.integers(0, 2**40)
generations = st.from_regex("[0-9]{1,9}(-[0-9]{1,9})?", fullmatch=True)
files = st.builds(wire_names.data_file, numbers, numbers, generations)
part_files = st.builds(wire_names.part_file, numbers, generations)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=5), child, max_size=3),
    max_leaves=8,
)
frames = st.builds(lambda kind, rest: {**rest, "type": kind}, names, st.dictionaries(names, values, max_size=4))


@st.composite
def items(draw: st.DrawFn) -> layout.Item:
    size = draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    offsets = tuple(draw(st.integers(0, n)) for n in size)
    sizes = tuple(draw(st.integers(0, n - o)) for n, o in zip(size, offsets, strict=True))
    return layout.Item(draw(names), draw(st.sampled_from(sorted(layout.ITEMSIZE_BYTES))), size, offsets, sizes)


paths = st.dictionaries(names, st.lists(names | st.integers(0, 9), max_size=3).map(tuple), max_size=3)
layouts = st.builds(
    layout.Layout, st.lists(items(), max_size=5).map(tuple), st.lists(names, max_size=4).map(tuple), paths
)


@given(sent=st.lists(frames, max_size=6), data=st.data())
def test_frames_come_out_as_they_went_in_however_the_stream_was_cut(
    sent: list[dict[str, Any]], data: st.DataObject
) -> None:
    """A decoder fed any split of a stream of frames yields the messages, in order, none twice."""
    stream = b"".join(messages.encode(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = messages.Decoder()
    found = []
    for first, last in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += list(decoder.feed(stream[first:last]))
    assert found == sent


@given(noise=st.binary(max_size=200))
def test_noise_is_a_bad_frame_or_nothing_yet(noise: bytes) -> None:
    """No bytes make the decoder raise anything but BadFrame, or yield what is no message."""
    try:
        for message in messages.Decoder(max_frame_bytes=100).feed(noise):
            assert isinstance(message["type"], str)
    except messages.BadFrame:
        pass


@given(of=layouts)
def test_a_layout_survives_its_encoding(of: layout.Layout) -> None:
    """Decoding gives an equal layout of equal digest, and images that do not overlap."""
    found = layout.decode(of.encoded)
    assert (found, found.digest) == (of, of.digest)
    ends = [start + layout.HEAD_BYTES for start in of.starts]
    for index, item in enumerate(of.items):
        assert of.payload_starts[index] == ends[index]
        assert of.payload_starts[index] % layout.ALIGNMENT_BYTES == 0
        assert of.payload_starts[index] + item.payload_bytes + layout.TAIL_BYTES <= of.end(index)
    assert of.tensors_bytes == (of.end(len(of.items) - 1) if of.items else 0)


@given(of=layouts, cut=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_damaged_layout_is_refused_or_still_a_possible_one(of: layout.Layout, cut: float, bit: int) -> None:
    """A flipped bit never raises anything but ValueError, nor gives a chunk outside its tensor."""
    damaged = bytearray(of.encoded)
    damaged[int(cut * (len(damaged) - 1))] ^= 1 << bit
    try:
        found = layout.decode(bytes(damaged))
    except ValueError:
        return
    for item in found.items:
        assert all(o >= 0 and o + n <= s for s, o, n in zip(item.size, item.offsets, item.sizes, strict=True))


@st.composite
def parts(draw: st.DrawFn) -> manifest.Part:
    chunks = [
        manifest.StoredChunk(i.fqn, i.dtype, i.size, i.offsets, i.sizes, draw(files), draw(numbers), draw(numbers), "d")
        for i in draw(st.lists(items(), max_size=3))
    ]
    opaque = [manifest.StoredBytes(draw(names), draw(files), draw(numbers), draw(numbers), "e") for _ in range(2)]
    return manifest.Part(
        step=draw(numbers),
        generation=draw(names),
        run_id=draw(names),
        world_size=draw(numbers),
        plan_id=draw(names),
        ranks=tuple(draw(st.lists(numbers, max_size=3))),
        files=draw(st.dictionaries(files, numbers, max_size=2)),
        chunks=tuple(chunks),
        opaque=tuple(opaque),
        paths=draw(paths),
    )


manifests = st.builds(
    manifest.Manifest,
    step=numbers, generation=names, run_id=names, world_size=numbers, plan_id=names, created_ns=numbers,
    size_bytes=numbers, digest_algorithm=names, metadata_digest=names,
    parts=st.lists(
        st.builds(manifest.PartReference, part_files, st.lists(numbers, max_size=3).map(tuple), names, numbers), max_size=3
    ).map(tuple),
)  # fmt: skip


@given(part=parts(), of=manifests, cut=st.floats(0, 1), bit=st.integers(0, 7))
def test_manifests_and_parts_survive_their_encoding_and_damage_is_a_manifest_error(
    part: manifest.Part, of: manifest.Manifest, cut: float, bit: int
) -> None:
    """What is read is what was written; of a damaged file either another value comes, or ManifestError and nothing else."""
    assert manifest.decode_part(part.encode()) == part
    assert manifest.decode_manifest(of.encode()) == of
    for encoded, decode in ((part.encode(), manifest.decode_part), (of.encode(), manifest.decode_manifest)):
        damaged = bytearray(encoded)
        damaged[int(cut * (len(damaged) - 1))] ^= 1 << bit
        try:
            decode(bytes(damaged))
        except manifest.ManifestError:
            continue


@pytest.mark.parametrize("version", [0, 2, "1", None, True, -1])
def test_another_format_version_is_refused_and_named(version: object) -> None:
    """A manifest of a format that this release does not know is a ManifestError with the number."""
    document = json.loads(manifest.Manifest(
        step=1, generation="1", run_id="", world_size=1, plan_id="", created_ns=0, size_bytes=0, digest_algorithm="",
        metadata_digest="", parts=(),
    ).encode())  # fmt: skip
    document["format"] = version
    with pytest.raises(manifest.ManifestError, match=f"format {version!r}"):
        manifest.decode_manifest(json.dumps(document).encode())


headers = st.builds(
    arena.SlotHeader,
    state=st.sampled_from(list(arena.SlotState)), flags=st.integers(0, 3).map(arena.Flag), sequence=numbers,
    step=st.integers(-1, 2**62), rank=st.integers(0, 2**32 - 1), world_size=st.integers(0, 2**32 - 1),
    image_bytes=st.integers(0, 2**20), layout_offset=st.integers(0, 2**20), layout_bytes=st.integers(0, 2**20),
    trailer_offset=st.integers(0, 2**20), trailer_bytes=st.integers(0, 2**20), sealed_ns=numbers,
    layout_digest=st.binary(min_size=16, max_size=16), session=st.binary(min_size=16, max_size=16),
    digests_offset=st.integers(0, 2**20), digests_count=st.integers(0, 2**10), digests_for=numbers,
)  # fmt: skip


@given(header=headers, page=st.binary(min_size=arena.SLOT_FORMAT.size, max_size=arena.SLOT_FORMAT.size))
def test_slot_headers_survive_and_no_page_gives_an_extent_outside_the_slot(
    header: arena.SlotHeader, page: bytes
) -> None:
    """A header is read as it was written; any other page is a ValueError or has its extents within the slot."""
    assert arena.SlotHeader.unpack(header.pack(), stride_bytes=2**30) == header
    for candidate in (page, arena.SLOT_MAGIC + page[8:]):
        try:
            found = arena.SlotHeader.unpack(candidate, stride_bytes=2**20)
        except ValueError:
            continue
        assert found.layout_offset + found.layout_bytes <= 2**20
        assert arena.PAGE_BYTES + found.image_bytes <= 2**20


failures = st.dictionaries(
    st.integers(0, 99), st.builds(errors.RemoteFailure, names, names, names, st.integers(0, 2**20)), max_size=3
)


@given(failures=failures, message=names, missing=st.lists(st.integers(0, 9), max_size=3), waited=st.floats(0, 1e6))
@settings(max_examples=50)
def test_errors_cross_a_process_as_what_they_are(
    failures: dict[int, errors.RemoteFailure], message: str, missing: list[int], waited: float
) -> None:
    """Class, failures and fields of every error that the sidecar tells survive a JSON text; the text does not grow."""
    told: list[errors.PillionError] = [
        kind(message, step=3, failures=failures)
        for kind in (
            errors.SaveError, errors.SaveSkipped, errors.StagingError, errors.PersistError, errors.CommitError,
        )
    ]  # fmt: skip
    told += [
        errors.BarrierTimeout(phase=message, missing=missing, waited_s=waited, failures=failures),
        errors.ArenaExhausted(needed_bytes=5, available_bytes=3),
        errors.ArenaExhausted(needed_bytes=5, available_bytes=3, cause="full", remedy="free it"),
        errors.SettingsError([message, "b"]),
        errors.IncompatibleCheckpoint(message, fqns=[message]),
        errors.CorruptCheckpoint(message, reasons={message: "why"}),
        errors.NoCheckpoint(message),
        errors.UsageError(message),
        errors.SidecarUnavailable(message),
        errors.InternalError(message),
    ]
    for error in told:
        document = json.loads(json.dumps(errors.ErrorDocument.from_exception(error).to_document()))
        found = errors.ErrorDocument.from_document(document).to_exception(step=3)
        assert type(found) is type(error)
        for name in ("failures", "phase", "missing", "waited_s", "fqns", "reasons", "problems", "needed_bytes"):
            assert getattr(found, name, None) == getattr(error, name, None), name
        again = errors.ErrorDocument.from_exception(found)
        assert dataclasses.asdict(again) == dataclasses.asdict(errors.ErrorDocument.from_document(document))


def test_a_version_mismatch_swaps_its_sides_on_the_way() -> None:
    """What the sidecar calls its own version is the other one's for the client."""
    told = errors.ErrorDocument.from_exception(errors.ProtocolMismatch(own_version=1, peer_version=2))
    found = errors.ErrorDocument.from_document(json.loads(json.dumps(told.to_document()))).to_exception()
    assert isinstance(found, errors.ProtocolMismatch)
    assert (found.own_version, found.peer_version) == (2, 1)
