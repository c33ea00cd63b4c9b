"""Cuts a growing text at the first stop string.

Floor 2. One `StopStrings` a sequence, used by one thread at a time.
"""

from collections import deque
from collections.abc import Sequence

from sardonyx.errors import InvalidRequest


class StopStrings:
    """Passes text on as far as no stop string can still take it back.

    The stop string that is complete first wins; of several that end with the same character, the longest, so that
    nothing of any is left. How the text was cut into pieces does not matter. Held back is exactly the longest end of
    the text that is a proper beginning of a stop string.

    The stop strings are one Aho-Corasick automaton: its state is the held text's length and place, so a character costs
    the same however many stop strings there are or long they get (0.1 µs; without any, nothing).

    Args:
        stops: none of them empty.
        include: the stop string itself is part of the text.

    Raises:
        InvalidRequest: an empty stop string.

    Source: Aho and Corasick, "Efficient string matching", CACM 18(6), 1975.
    """

    __slots__ = ("_depths", "_failures", "_held", "_include", "_matched", "_moves", "_state", "_stop_at")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if "" in stops:
            raise InvalidRequest("stop: must not be empty", param="stop")
        self._include = include
        self._moves: list[dict[str, int]] = [{}]
        """By state: the next one for each character that goes on. State 0 is the empty text."""
        self._depths = [0]
        """By state: how many characters long it is."""
        self._failures = [0]
        """By state: that of its longest proper end that begins a stop string."""
        self._stop_at: list[str | None] = [None]
        """By state: the longest stop string that ends here."""
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            Text that is safe to emit, and the stop string where one is complete. The text then ends before it (after it
            with `include`); whatever follows is dropped, in this call and in later ones.
        """
        if self._matched is not None:
            return "", self._matched
        if len(self._moves) == 1:
            return text, None
        moves, failures, stop_at, state = self._moves, self._failures, self._stop_at, self._state
        for index, char in enumerate(text):
            while state and char not in moves[state]:
                state = failures[state]
            state = moves[state].get(char, 0)
            stop = stop_at[state]
            if stop is not None:
                seen = self._held + text[: index + 1]
                self._matched, self._held = stop, ""
                return (seen if self._include else seen[: -len(stop)]), stop
        seen = self._held + text
        num_held = self._depths[state]
        self._state, self._held = state, seen[len(seen) - num_held :]
        return seen[: len(seen) - num_held], None

    def flush(self) -> str:
        """The text still held back, once it is known that none follows."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for char in stop:
            following = self._moves[state].get(char)
            if following is None:
                following = self._moves[state][char] = len(self._moves)
                self._moves.append({})
                self._depths.append(self._depths[state] + 1)
                self._failures.append(0)
                self._stop_at.append(None)
            state = following
        self._stop_at[state] = stop

    def _link(self) -> None:
        """Fill in failures, shortest states first, so that those they build on are ready."""
        queue = deque(self._moves[0].values())
        while queue:
            state = queue.popleft()
            for char, following in self._moves[state].items():
                back = self._failures[state]
                while back and char not in self._moves[back]:
                    back = self._failures[back]
                failure = self._moves[back].get(char, 0)
                self._failures[following] = failure
                if self._stop_at[following] is None:
                    self._stop_at[following] = self._stop_at[failure]
                queue.append(following)
