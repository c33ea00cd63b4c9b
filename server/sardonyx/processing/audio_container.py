"""What files of sound say of themselves: which kind they are, and whether they are whole.

Floor 2. The rule for files that were cut off: a container that states how many bytes it has must have them all. Where
nothing is stated, by design (MP3 without an index, ADTS, AMR) or because it was written to a pipe (a size of zero, of
all ones, or of 2 GB and more, as writers put it that cannot go back), what is there is the sound.

Source: RIFF and "Multimedia Programming Interface and Data Specifications 1.0"; EBU Tech 3306 (RF64); "Audio
Interchange File Format 1.3"; Apple, "Core Audio Format Specification"; RFC 3533 (Ogg); ISO/IEC 14496-12 (boxes);
RFC 8794 (EBML).
"""

import struct
from typing import Literal

Kind = Literal["wav", "aiff", "au", "caf", "flac", "ogg", "mp3", "chained ogg", "mp4", "matroska", "aac", "amr"]

_UNKNOWN_SIZE = 0x7FFF_0000
"""From here on a size of 32 bits is none: no request is so large."""
_MAX_CHUNKS = 10_000
"""That are looked at; sound has some ten, or two a second where it is fragmented."""
_SLACK_BYTES = 64
"""Some writers count their header as sound."""
_OGG_FIRST_PAGE = b"OggS\0\x02"
_MP3_SLACK_BYTES = 2 * 1441
"""Two frames, the longest that there are: writers differ in what the index counts."""
_TAGS_BEHIND_MP3 = (b"TAG", b"APETAGEX", b"LYRICSBEGIN")
_ID3_HEADER_BYTES = 10
_MOV_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_EBML_ID, _SEGMENT_ID = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def kind_of(data: bytes) -> Kind | None:
    """By the first bytes; no name and no media type is asked for."""
    head = data[:12]
    if (head[:4] in (b"RIFF", b"RIFX", b"RF64")) and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[:4] == b"OggS":
        # One stream after the other, or several at once: libsndfile would read the first and no more.
        return "chained ogg" if data.find(_OGG_FIRST_PAGE, 1) > 0 else "ogg"
    if head[4:8] in _MOV_BOXES:
        return "mp4"
    if head[:6] in (b"#!AMR\n", b"#!AMR-"):
        return "amr"
    plain: dict[bytes, Kind] = {b".snd": "au", b"caff": "caf", b"fLaC": "flac", _EBML_ID: "matroska"}
    return plain.get(head[:4]) or _kind_behind_id3(data)


def is_cut_short(kind: Kind, data: bytes) -> bool:
    """Whether the container states more bytes than there are."""
    try:
        match kind:
            case "wav":
                return _riff_lacks(data)
            case "aiff":
                return _chunk_lacks(data, ">4sI", b"SSND")
            case "au":
                offset, size = struct.unpack_from(">II", data, 4)
                return bool(size < _UNKNOWN_SIZE and offset + size > len(data) + _SLACK_BYTES)
            case "caf":
                return _caf_lacks(data)
            case "ogg" | "chained ogg":
                return _ogg_lacks(data)
            case "mp3":
                return _mp3_lacks(data)
            case "mp4":
                return _boxes_lack(data)
            case "matroska":
                return _segment_lacks(data)
    except (struct.error, IndexError):
        return True  # cut off inside of the header itself
    return False


def with_known_size(data: bytes) -> bytes:
    """A WAV file that was never finished, with a size of zero, gets the size of what is there; others stay."""
    is_finished = data[:4] != b"RIFF" or int.from_bytes(data[4:8], "little") + 8 == len(data)
    found = None if is_finished else _find_chunk(data, "<4sI", b"data")
    if found is None or found[1]:
        return data
    start = found[0]
    return data[: start - 4] + struct.pack("<I", len(data) - start) + data[start:]


def mp3_without_short_index(data: bytes) -> tuple[bytes, bool]:
    """The file, and whether its index states its length.

    Behind the end that the index states may lie a second file, put there by ``cat``. Such an index is made unreadable,
    for decoders end where it says.
    """
    start, at = _mp3_index(data)
    if at is None or not data[at + 7] & 1:
        return data, False
    if data[at + 7] & 2:
        (stated,) = struct.unpack_from(">I", data, at + 12)
        end = start + stated
        if len(data) - end > _MP3_SLACK_BYTES and not data.startswith(_TAGS_BEHIND_MP3, end):
            return data[:at] + bytes(4) + data[at + 4 :], False
    return data, True


def _id3_bytes(data: bytes) -> int:
    """Of the tag in front.

    Source: ID3v2.4.0, section 3.1: four times seven bits.
    """
    if data[:3] != b"ID3" or len(data) < _ID3_HEADER_BYTES:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return _ID3_HEADER_BYTES + size


def _kind_behind_id3(data: bytes) -> Kind | None:
    start = _id3_bytes(data)
    head = data[start : start + 4]
    if head == b"fLaC":
        return "flac"
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    # Two bits name the layer; ADTS took the pair that no layer has.
    if head[1] >> 1 & 3:
        return "mp3"
    return "aac" if head[1] & 0xF0 == 0xF0 else None


def _find_chunk(data: bytes, header: str, wanted: bytes) -> tuple[int, int] | None:
    """Where the chunk's content begins, and its stated size."""
    at = 12
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return None
        name, size = struct.unpack_from(header, data, at)
        if name == wanted:
            return at + 8, size
        at += 8 + size + size % 2
    return None


def _chunk_lacks(data: bytes, header: str, wanted: bytes) -> bool:
    found = _find_chunk(data, header, wanted)
    if found is None:
        return False
    start, size = found
    return size < _UNKNOWN_SIZE and start + size > len(data) + _SLACK_BYTES


def _riff_lacks(data: bytes) -> bool:
    if data[:4] == b"RIFX":
        return _chunk_lacks(data, ">4sI", b"data")
    if data[:4] == b"RF64":
        found = _find_chunk(data, "<4sI", b"data")
        _, size = struct.unpack_from("<QQ", data, 20)
        known: bool = data[12:16] == b"ds64" and size < _UNKNOWN_SIZE
        return known and found is not None and found[0] + size > len(data) + _SLACK_BYTES
    return _chunk_lacks(data, "<4sI", b"data")


def _caf_lacks(data: bytes) -> bool:
    """Sizes have 64 bits and no padding; -1 stands for the rest of the file."""
    at = 8
    for _ in range(_MAX_CHUNKS):
        name, size = struct.unpack_from(">4sq", data, at)
        at += 12 + max(0, size)
        if name == b"data" or at >= len(data):
            return bool(at > len(data))
    return False


def _ogg_lacks(data: bytes) -> bool:
    """A page begins with the lengths of its segments."""
    at = data.rfind(b"OggS")
    table = data[at + 27 : at + 27 + data[at + 26]]
    return len(table) < data[at + 26] or at + 27 + len(table) + sum(table) > len(data)


def _mp3_index(data: bytes) -> tuple[int, int | None]:
    """Where the first frame begins, and where in it the index, if there is one."""
    start = _id3_bytes(data)
    # Behind the header, a checksum, and 9 to 32 bytes of side information.
    head = data[start : start + 48]
    found = [at for at in (head.find(b"Xing"), head.find(b"Info")) if at >= 0]
    if not found or len(data) < start + found[0] + 16:
        return start, None
    return start, start + found[0]


def _mp3_lacks(data: bytes) -> bool:
    start, at = _mp3_index(data)
    if at is None or data[at + 7] & 3 != 3:
        return False
    (stated,) = struct.unpack_from(">I", data, at + 12)
    return bool(start + stated > len(data) + _MP3_SLACK_BYTES)


def _boxes_lack(data: bytes) -> bool:
    at = 0
    for _ in range(_MAX_CHUNKS):
        if at + 8 > len(data):
            return at > len(data)
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, at + 8)
        elif size == 0:
            return False  # to the end of the file
        if not name.isascii() or size < 8:
            return False  # something that is no box; the decoder may make sense of it
        at += size
    return False


def _segment_lacks(data: bytes) -> bool:
    at = 4
    size, at = _ebml_size(data, at)
    at += size or 0
    if data[at : at + 4] != _SEGMENT_ID:
        return at > len(data)
    size, at = _ebml_size(data, at + 4)
    return size is not None and at + size > len(data)


def _ebml_size(data: bytes, at: int) -> tuple[int | None, int]:
    """A number of 1 to 8 bytes, ``None`` if all its bits are set, and where it ends."""
    num_bytes = 9 - data[at].bit_length()
    if num_bytes > 8:
        raise IndexError
    value = int.from_bytes(data[at : at + num_bytes], "big") & ((1 << 7 * num_bytes) - 1)
    return None if value == (1 << 7 * num_bytes) - 1 else value, at + num_bytes
