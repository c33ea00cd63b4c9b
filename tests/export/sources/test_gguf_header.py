import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.export.checkpoints import tiny_llama_metadata, tiny_llama_tensors, write_gguf

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_file import GgufFile
from sardonyx_export.sources.gguf_header import MAX_ARRAY_LENGTH, read_header

_MAGIC = b"GGUF" + struct.pack("<I", 3)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _counts(num_tensors: int, num_keys: int) -> bytes:
    return struct.pack("<QQ", num_tensors, num_keys)


def _tensor(name: str, dims: list[int], qtype: int, offset: int) -> bytes:
    head = _string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", qtype, offset)


def test_metadata_and_tensors_agree_with_the_reference_reader(tmp_path: Path) -> None:
    quantised = {"blk.0.ffn_gate.weight": gguf.GGMLQuantizationType.Q4_0}
    path = write_gguf(
        tmp_path / "tiny.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors(), quantised=quantised
    )
    header = read_header(path)
    reference = gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == expected
    assert [
        (info.name, info.qtype, info.shape[::-1], info.offset, info.num_bytes) for info in header.tensors.values()
    ] == [(t.name, t.tensor_type, tuple(t.shape), t.data_offset, t.n_bytes) for t in reference.tensors]


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(kind, 7)
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.25)
    writer.add_bool("bool", True)
    writer.add_array("booleans", [True, False])
    writer.add_array("texts", ["ä", ""])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = read_header(tmp_path / "types.gguf").metadata
    assert [metadata[kind] for kind in ("uint8", "int64", "float32", "float64")] == [7, 7, 0.5, 0.25]
    assert metadata["bool"] is True
    assert metadata["booleans"] == [True, False]
    assert metadata["texts"] == ["ä", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GGUG" + bytes(20), "does not begin with GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "version 1"),
        (_MAGIC + b"\0" * 4, "ends at byte"),
        (_MAGIC + _counts(2**60, 0), "declares"),
        (_MAGIC + _counts(0, 2**60), "declares"),
        (_MAGIC + _counts(0, 1) + struct.pack("<Q", 2**62) + bytes(16), "declares"),
        (_MAGIC + _counts(0, 1) + _string("k") + struct.pack("<IIQ", 9, 8, 2**61) + bytes(64), "declares"),
        (_MAGIC + _counts(0, 1) + _string("k") + struct.pack("<IIQ", 9, 6, 2**62) + bytes(64), "declares"),
        (_MAGIC + _counts(0, 1) + _string("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "unsupported type 9"),
        (_MAGIC + _counts(0, 1) + _string("k") + struct.pack("<I", 99) + bytes(64), "unknown type 99"),
        (_MAGIC + _counts(0, 2) + (_string("k") + struct.pack("<IB", 0, 1)) * 2 + bytes(64), "k: occurs twice"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [8], 0, 0), "declares 32 bytes"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [2**40, 2**40], 0, 0) + bytes(64), "declares"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [8], 0, 2**63) + bytes(64), "declares"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [8], 0, 4) + bytes(64), "declares"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [8, 1, 1, 1, 1], 0, 0) + bytes(64), "5 dimensions"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [0], 0, 0) + bytes(64), "does not fit"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [8], 2, 0) + bytes(64), "does not fit blocks of 32"),
        (_MAGIC + _counts(1, 0) + _tensor("t", [8], 200, 0) + bytes(64), "unknown block type 200"),
        (_MAGIC + _counts(2, 0) + _tensor("t", [8], 0, 0) * 2 + bytes(128), "t: occurs twice"),
        (_MAGIC + _counts(0, 1) + _string("general.alignment") + struct.pack("<II", 4, 3), "no power of two"),
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=message):
        read_header(path)


def test_more_array_elements_than_any_vocabulary_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    count = MAX_ARRAY_LENGTH + 1
    head = _MAGIC + _counts(0, 1) + _string("k") + struct.pack("<IIQ", 9, 0, count)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + count)
    with pytest.raises(ExportError, match="are allowed"):
        read_header(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_an_export_error_or_a_checkpoint(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "good.gguf"
    if not path.exists():
        metadata = tiny_llama_metadata(1)
        write_gguf(path, metadata=metadata, tensors=tiny_llama_tensors(1))
    content = bytearray(path.read_bytes())
    header_end = min(info.offset for info in read_header(path).tensors.values())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    damaged = tmp_path / "bad.gguf"
    damaged.write_bytes(bytes(content))
    try:
        checkpoint = GgufFile(damaged, uri="bad")
        for name in checkpoint.names():
            tensor = checkpoint.tensor(name)
            assert tensor.info.num_bytes <= len(content)
            assert tensor.read().shape == tensor.shape
        checkpoint.texts()
    except ExportError:
        pass


def test_strings_with_broken_bytes_are_replaced_not_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(_MAGIC + _counts(0, 1) + _string("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe" + bytes(32))
    assert read_header(path).metadata == {"k": "\ufffd\ufffd"}


def test_shape_is_rows_first(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", tensors={"token_embd.weight": np.zeros((3, 8), np.float32)})
    assert read_header(path).tensors["token_embd.weight"].shape == (3, 8)
