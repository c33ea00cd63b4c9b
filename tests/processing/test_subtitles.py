"""Subtitles against golden files, and read back by a parser that knows no more than the formats."""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.processing.subtitles import srt, vtt


@dataclass
class Spoken:
    start_s: float
    end_s: float
    text: str


SPOKEN = [
    Spoken(0.0, 4.0, " The low road was closed."),
    Spoken(4.0, 7.36, "Tom & Jerry said: 1 < 2 --> true ---> done"),
    Spoken(7.36, 7.36, " \n "),
    Spoken(59.9996, 3599.9995, "two\nlines\r\n\r\nand\u2028more"),
    Spoken(3600.0, 360_000.5, "「東京」　🙂  "),
]
CUE = r"(\d{2,}):([0-5]\d):([0-5]\d)%s(\d{3}) --> (\d{2,}):([0-5]\d):([0-5]\d)%s(\d{3})\n(.+)"


def times_s(match: re.Match[str], first: int) -> tuple[float, float]:
    numbers = [int(group) for group in match.groups()[first : first + 8]]
    starts, ends = numbers[:4], numbers[4:]
    return tuple(hours * 3600 + minutes * 60 + seconds + ms / 1000 for hours, minutes, seconds, ms in (starts, ends))


def read_srt(text: str) -> list[tuple[float, float, str]]:
    assert not text or text.endswith("\n\n")
    cues = []
    for number, block in enumerate(text.split("\n\n")[:-1], 1):
        match = re.fullmatch(r"(\d+)\n" + CUE % (",", ","), block)
        assert match is not None, block
        assert int(match[1]) == number
        cues.append((*times_s(match, 1), match.groups()[-1]))
    return cues


def read_vtt(text: str) -> list[tuple[float, float, str]]:
    header, *blocks, rest = text.split("\n\n")
    assert (header, rest) == ("WEBVTT", "")
    cues = []
    for block in blocks:
        match = re.fullmatch(CUE % (r"\.", r"\."), block)
        assert match is not None, block
        payload = match.groups()[-1]
        assert "<" not in payload
        cues.append((*times_s(match, 0), html.unescape(payload)))
    return cues


@pytest.mark.parametrize("write", [srt, vtt])
def test_subtitles_are_the_golden_ones(write):
    golden = Path(__file__).parent / f"golden_subtitles.{write.__name__}"
    assert write(SPOKEN) == golden.read_bytes().decode()


def test_without_segments_only_the_header_is_left():
    assert srt([]) == ""
    assert vtt([]) == "WEBVTT\n\n"


MOMENTS = st.floats(0, 500_000, allow_nan=False)
# Pieces that subtitles are sensitive to; what a model writes has no halves of surrogate pairs.
TEXTS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    | st.sampled_from(["-->", "--", ">", "\n", "\r\n\r\n", "&lt;", "<b>", "1\n", "\x85", "\0"])
).map("".join)


def bare(text: str) -> str:
    """Without blanks, and with arrows of any length made short: both may differ from what was said."""
    return re.sub("-+>", "->", re.sub(r"[\s\0]+", "", text))


@given(st.lists(st.builds(Spoken, MOMENTS, MOMENTS, TEXTS)))
def test_what_was_said_and_when_can_be_read_back(segments):
    expected = [each for each in segments if bare(each.text)]
    for cues in (read_srt(srt(segments)), read_vtt(vtt(segments))):
        assert [bare(text) for *_, text in cues] == [bare(each.text) for each in expected]
        assert all("-->" not in text and text == text.strip() for *_, text in cues)
        for (start, end, _), each in zip(cues, expected, strict=True):
            assert (start, end) == pytest.approx((each.start_s, each.end_s), abs=0.00051)
