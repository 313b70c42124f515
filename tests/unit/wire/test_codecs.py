"""The wire's codecs: what goes in comes out, and what is damaged is refused by name."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillion.wire import arena, home, layout, manifest, messages

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
messages_in = st.lists(st.dictionaries(st.text(min_size=1, max_size=8), json_values, max_size=4), max_size=5)


@given(messages_in, st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(deadline=None)
def test_messages_survive_any_split_of_the_stream(bodies: list[dict[str, object]], cuts: list[int]) -> None:
    """A frame may arrive byte by byte, or several in one piece."""
    sent = [{**body, "type": "t"} for body in bodies]
    stream = b"".join(messages.encode(message) for message in sent)
    decoder, received, start, turn = messages.Decoder(), [], 0, 0
    while start < len(stream):
        step = cuts[turn % len(cuts)]
        received += list(decoder.feed(stream[start : start + step]))
        start, turn = start + step, turn + 1
    assert received == sent


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\x00\x00\x00\x02[]", b"\x00\x00\x00\x02{}", b"\x00\x00\x00\x03\xff\xfe\xfd"],
    ids=["too long", "a list", "no type", "no UTF-8"],
)
def test_what_is_no_message_is_a_bad_frame(data: bytes) -> None:
    """Too long, no object, no type, no text."""
    with pytest.raises(messages.BadFrame):
        list(messages.Decoder().feed(data))


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_no_bytes_make_the_decoder_raise_anything_but_bad_frame(data: bytes) -> None:
    """A stranger on the socket can be refused, and nothing else."""
    with contextlib.suppress(messages.BadFrame):
        list(messages.Decoder(max_frame_bytes=1000).feed(data))


slot_headers = st.builds(
    arena.SlotHeader,
    state=st.sampled_from(arena.SlotState),
    flags=st.sampled_from([arena.Flag.NONE, arena.Flag.PERSISTED, arena.Flag.SNAPSHOT]),
    sequence=st.integers(0, 2**63),
    step=st.integers(-1, 2**62),
    rank=st.integers(0, 2**31),
    world_size=st.integers(0, 2**31),
    image_bytes=st.integers(0, 1000),
    layout_digest=st.binary(min_size=16, max_size=16),
    session=st.binary(min_size=16, max_size=16),
)


@given(slot_headers)
@settings(deadline=None)
def test_a_slot_header_comes_back_as_it_was(header: arena.SlotHeader) -> None:
    """Every field has its place in the page."""
    page = header.pack().ljust(arena.PAGE_BYTES, b"\0")
    assert arena.SlotHeader.unpack(page, stride_bytes=1 << 30) == header


@given(st.binary(min_size=arena.SLOT_FORMAT.size, max_size=arena.SLOT_FORMAT.size))
@settings(deadline=None)
def test_garbage_in_a_header_page_is_a_value_error_or_within_the_slot(body: bytes) -> None:
    """No header leads a reader out of its slot."""
    try:
        header = arena.SlotHeader.unpack(arena.SLOT_MAGIC + body[8:], stride_bytes=1 << 20)
    except ValueError:
        return
    assert header.layout_offset + header.layout_bytes <= 1 << 20
    assert header.trailer_offset + header.trailer_bytes <= 1 << 20


def test_the_byte_tables_of_the_module_are_what_the_codec_does() -> None:
    """The documented offset of each field is where it is packed."""
    text = arena.__doc__ or ""
    rows = [line.split("|") for line in text.splitlines() if line.strip().startswith("|")]
    slot_rows = [row for row in rows if len(row) >= 6 and row[1].strip().isdigit()][4:]
    offset = 0
    for row, code in zip(
        slot_rows, ["8s", "I", "I", "Q", "q", "I", "I", *"QQQQQQ", *["16s"] * 4, *"QQQQI"], strict=True
    ):
        size = {"8s": 8, "16s": 16, "I": 4}.get(code, 8)
        assert (int(row[1]), int(row[2])) == (offset, size), row[3].strip()
        offset += size
    assert offset == arena.SLOT_FORMAT.size


items = st.integers(0, 3).flatmap(
    lambda dims: st.builds(
        lambda fqn, dtype, size: layout.Item(fqn, dtype, tuple(size), (0,) * dims, tuple(size)),
        st.text(min_size=1, max_size=10),
        st.sampled_from(sorted(layout.ITEMSIZE_BYTES)),
        st.lists(st.integers(0, 5), min_size=dims, max_size=dims),
    )
)


@given(st.lists(items, max_size=6), st.lists(st.text(min_size=1, max_size=6), max_size=3))
@settings(deadline=None)
def test_a_layout_comes_back_and_its_extents_never_overlap(each: list[layout.Item], opaque: list[str]) -> None:
    """Archives lie one behind the other, aligned, with room for head and tail."""
    made = layout.Layout(tuple(each), tuple(opaque), {fqn: (fqn,) for fqn in opaque})
    assert layout.decode(made.encoded) == made
    end = 0
    for index, start in enumerate(made.starts):
        assert start == end
        assert start % layout.ALIGNMENT_BYTES == 0
        end = made.end(index)
        assert end - start >= layout.HEAD_BYTES + made.items[index].payload_bytes + layout.TAIL_BYTES
    assert made.tensors_bytes == end


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(deadline=None)
def test_a_damaged_document_is_refused_by_its_reader(data: bytes) -> None:
    """Layouts, parts and manifests raise their own error, whatever the bytes."""
    with pytest.raises(ValueError, match=r"."):
        layout.decode(data)
    with pytest.raises(manifest.ManifestError):
        manifest.decode_part(data)
    with pytest.raises(manifest.ManifestError):
        manifest.decode_manifest(data)


def test_a_part_and_a_manifest_come_back_as_they_were() -> None:
    """All fields, in one example of each."""
    chunk = manifest.StoredChunk("w", "float32", (4, 2), (2, 0), (2, 2), "__0_0.3.distcp", 4096, 1600, "ab")
    part = manifest.Part(
        step=7, generation="3", run_id="r", world_size=2, plan_id="p", ranks=(0, 1), files={"__0_0.3.distcp": 8192},
        chunks=(chunk,), opaque=(manifest.StoredBytes("lr", "__0_0.3.distcp", 0, 10, "cd"),), paths={"w": ("m", 0, "w")},
    )  # fmt: skip
    assert manifest.decode_part(part.encode()) == part
    made = manifest.Manifest(
        step=7, generation="3", run_id="r", world_size=2, plan_id="p", created_ns=1, size_bytes=9, digest_algorithm="x",
        metadata_digest="ef", parts=(manifest.PartReference("part-0.3.json", (0, 1), "aa", 5),),
    )  # fmt: skip
    assert manifest.decode_manifest(made.encode()) == made


@pytest.mark.parametrize("number", ["1e999", "Infinity", "NaN"])
def test_a_report_with_a_number_that_is_not_finite_is_refused_by_its_field(number: str) -> None:
    """Python's reader takes what JSON does not have, and the seconds of a status are rounded later."""
    report = home.Report(namespace="a", pod="b", pod_uid="c", policy="d", job_kind="Job", job_name="e", job_id="f")
    body = home.encode(report).replace(b'"drain_s":0.0', f'"drain_s":{number}'.encode())
    with pytest.raises(home.BadReport, match="drain_s must be a finite number"):
        home.decode_report(body)
