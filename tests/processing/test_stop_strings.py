import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.errors import InvalidRequest
from sardonyx.processing.stop_strings import StopStrings

few_letters = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=5)


def naive(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the first stop string is complete, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return end, max(complete, key=len)
    return None


@given(pieces=st.lists(few_letters, max_size=8), stops=stop_lists, include=st.booleans())
def test_any_split_of_a_text_is_cut_where_the_whole_would_be(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    whole = "".join(pieces)
    stopper = StopStrings(stops, include=include)
    emitted, matched = "", None
    for piece in pieces:
        safe, matched = stopper.push(piece)
        emitted += safe
    emitted += stopper.flush()
    expected = naive(whole, stops)
    if expected is None:
        assert (emitted, matched) == (whole, None)
    else:
        end, stop = expected
        assert (emitted, matched) == (whole[: end if include else end - len(stop)], stop)


@given(pieces=st.lists(few_letters, max_size=8), stops=stop_lists)
def test_what_is_held_back_is_the_longest_end_that_could_become_a_stop_string(
    pieces: list[str], stops: list[str]
) -> None:
    stopper = StopStrings(stops)
    taken, emitted = "", ""
    for piece in pieces:
        safe, matched = stopper.push(piece)
        if matched is not None:
            return
        taken, emitted = taken + piece, emitted + safe
        beginnings = [stop[:n] for stop in stops for n in range(len(stop)) if taken.endswith(stop[:n])]
        held = max(beginnings, key=len, default="")
        assert emitted == taken.removesuffix(held)


def test_longest_of_the_stop_strings_that_end_together_is_cut() -> None:
    assert StopStrings(["bc", "abc", "c"]).push("xabc") == ("x", "abc")


def test_shorter_stop_string_inside_a_longer_one_stops_at_once() -> None:
    assert StopStrings(["abcd", "bc"]).push("abc") == ("a", "bc")


def test_stop_string_across_pieces_is_never_emitted() -> None:
    stopper = StopStrings(["\n\nHuman:"])
    assert stopper.push("Yes.\n") == ("Yes.", None)
    assert stopper.push("\nHu") == ("", None)
    assert stopper.push("man: and") == ("", "\n\nHuman:")
    assert stopper.push("more") == ("", "\n\nHuman:")
    assert stopper.flush() == ""


def test_included_stop_string_ends_the_text() -> None:
    stopper = StopStrings(["END"], include=True)
    assert stopper.push("text E") == ("text ", None)
    assert stopper.push("NDless") == ("END", "END")


def test_text_held_back_for_nothing_comes_at_the_end() -> None:
    stopper = StopStrings(["</s>"])
    assert stopper.push("a </") == ("a ", None)
    assert stopper.flush() == "</"
    assert stopper.flush() == ""


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(InvalidRequest) as error:
        StopStrings(["a", ""])
    assert error.value.param == "stop"


def test_cost_is_linear_for_stop_strings_that_almost_match() -> None:
    stopper = StopStrings(["a" * 5_000 + "b", "a" * 4_000 + "c"])
    num_emitted = sum(len(stopper.push("a")[0]) for _ in range(100_000))
    assert num_emitted + len(stopper.flush()) == 100_000
