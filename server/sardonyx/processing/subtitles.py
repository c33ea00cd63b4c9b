"""Subtitles: segments of text with times, as SubRip or WebVTT. Floor 2, pure.

Source: W3C, "WebVTT: The Web Video Text Tracks Format", section 4. SubRip has no specification: a number, a line of
times, the text, an empty line.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Protocol

_BREAKS = re.compile(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029\0]+\s*")


class Segment(Protocol):
    """A piece of what was said."""

    @property
    def start_s(self) -> float: ...

    @property
    def end_s(self) -> float: ...

    @property
    def text(self) -> str: ...


def srt(segments: Iterable[Segment]) -> str:
    """SubRip. Segments without text are left out; without any segment it is the empty string."""
    cues = (
        f"{number}\n{_time(each.start_s, ',')} --> {_time(each.end_s, ',')}\n{line}\n\n"
        for number, (each, line) in enumerate(_spoken(segments), 1)
    )
    return "".join(cues)


def vtt(segments: Iterable[Segment]) -> str:
    """WebVTT, always with hours; without segments only its header.

    The characters that begin tags and references are escaped, as the specification has it.
    """
    cues = (
        f"{_time(each.start_s, '.')} --> {_time(each.end_s, '.')}\n{_escaped(line)}\n\n"
        for each, line in _spoken(segments)
    )
    return "WEBVTT\n\n" + "".join(cues)


def _spoken(segments: Iterable[Segment]) -> Iterator[tuple[Segment, str]]:
    for segment in segments:
        if line := _line(segment.text):
            yield segment, line


def _time(seconds: float, point: str) -> str:
    """HH:MM:SS and milliseconds; hours grow beyond two digits where they have to."""
    whole, milliseconds = divmod(max(0, round(seconds * 1000)), 1000)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours:02}:{minute:02}:{second:02}{point}{milliseconds:03}"


def _line(text: str) -> str:
    """One line: an empty one would end the cue, and an arrow would begin another."""
    line = _BREAKS.sub(" ", text).strip()
    while "-->" in line:
        line = line.replace("-->", "->")
    return line


def _escaped(line: str) -> str:
    return line.replace("&", "&amp;").replace("<", "&lt;")
