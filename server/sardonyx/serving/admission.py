"""The bounded queue's yes or no: how much work may be accepted and unfinished at once, over all models.

Floor 4. A reservation is taken before a request costs anything and given back on every path out; both are plain
synchronous calls on the event loop, so nothing comes between looking and taking.
"""

import math
import random
import time
from collections.abc import Callable
from typing import Literal

from sardonyx.errors import Overloaded

BYTES_PER_TOKEN = 4
"""English under the usual vocabularies; only good until the tokeniser has counted."""
MIN_RETRY_S = 1.0
MAX_RETRY_S = 30.0
_JITTER = 0.2
_RATE_WINDOW_S = 30.0
_SHORT_S = 1e-3

Limit = Literal["requests", "tokens"]


def estimate_tokens(num_bytes: int) -> int:
    """Tokens that a text of so many bytes is likely to have, at least 1."""
    return max(1, -(-num_bytes // BYTES_PER_TOKEN))


class Reservation:
    """A place in the queue. Release it exactly where the request ends; further releases do nothing."""

    __slots__ = ("_admission", "num_sequences", "num_tokens")

    def __init__(self, admission: "Admission", num_sequences: int, num_tokens: int) -> None:
        self._admission: Admission | None = admission
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens

    def correct(self, num_tokens: int) -> None:
        """Replace the estimate by what the tokeniser counted.

        Raises:
            Overloaded: the estimate was too low and the difference does not fit. The reservation stays as it was.
        """
        if self._admission is not None:
            self._admission._correct(self, num_tokens)

    def release(self, *, was_served: bool = False) -> None:
        """Give the place back.

        Args:
            was_served: the tokens were worked off, so they count for the measured speed.
        """
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._release(self, was_served)


class Admission:
    """Counts sequences and prompt tokens that are admitted and not finished, and keeps both within limits.

    A request that is legal but larger than a limit is admitted when nothing else is: refusing it for ever would be
    worse than serving it alone.

    Args:
        max_sequences: prompts times choices.
        max_tokens: prompt tokens, those of each choice counted.
        unit: what messages call tokens; other units are counted in the same way.
        on_reject: told which limit said no.
        clock: monotonic seconds.
        jitter: uniform in [0, 1); spreads the clients that come back.
    """

    def __init__(
        self,
        max_sequences: int,
        max_tokens: int,
        *,
        unit: str = "queued prompt tokens",
        on_reject: Callable[[Limit], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.max_sequences = max_sequences
        self.max_tokens = max_tokens
        self.num_sequences = 0
        self.num_tokens = 0
        self._num_reservations = 0
        self._unit = unit
        self._on_reject = on_reject
        self._clock = clock
        self._jitter = jitter
        self._served_tokens = 0.0
        self._busy_s = 0.0
        self._counted_until_s = clock()

    def reserve(self, num_sequences: int, num_tokens: int) -> Reservation:
        """Take a place.

        Args:
            num_sequences: prompts times choices.
            num_tokens: prompt tokens of all of them together, see `estimate_tokens`.

        Raises:
            Overloaded: a limit is reached; the message names it.
        """
        if self._num_reservations:
            if self.num_sequences + num_sequences > self.max_sequences:
                raise self._refusal("requests")
            if self.num_tokens + num_tokens > self.max_tokens:
                raise self._refusal("tokens")
        self._count_time()
        self._num_reservations += 1
        self.num_sequences += num_sequences
        self.num_tokens += num_tokens
        return Reservation(self, num_sequences, num_tokens)

    def retry_after_s(self) -> float:
        """When a refused client should come back: the queued tokens at the measured speed, jittered, 1 to 30 s."""
        self._count_time()
        if self._served_tokens > 0.0 and self._busy_s > 0.0:
            wait_s = self.num_tokens * self._busy_s / self._served_tokens
        else:
            wait_s = MIN_RETRY_S
        wait_s *= 1.0 + _JITTER * (2.0 * self._jitter() - 1.0)
        return min(max(wait_s, MIN_RETRY_S), MAX_RETRY_S)

    def _refusal(self, limit: Limit) -> Overloaded:
        self._on_reject(limit)
        most = self.max_sequences if limit == "requests" else self.max_tokens
        what = "requests" if limit == "requests" else self._unit
        return Overloaded(
            f"the server is at its limit of {most:,} {what}; try again later", retry_after_s=self.retry_after_s()
        )

    def _correct(self, reservation: Reservation, num_tokens: int) -> None:
        more = num_tokens - reservation.num_tokens
        if more > 0 and self._num_reservations > 1 and self.num_tokens + more > self.max_tokens:
            raise self._refusal("tokens")
        reservation.num_tokens = num_tokens
        self.num_tokens += more

    def _release(self, reservation: Reservation, was_served: bool) -> None:
        self._count_time()
        self._num_reservations -= 1
        self.num_sequences -= reservation.num_sequences
        self.num_tokens -= reservation.num_tokens
        if was_served:
            self._served_tokens += reservation.num_tokens

    def _count_time(self) -> None:
        """Let old measurements fade. Only busy time counts: after an idle hour the server is as fast as before."""
        now_s = self._clock()
        if self._num_reservations:
            passed_s = now_s - self._counted_until_s
            if passed_s < _SHORT_S:
                return  # counted with what follows: tensor models come here ten thousand times a second
            fade = math.exp(-passed_s / _RATE_WINDOW_S)
            self._busy_s = self._busy_s * fade + passed_s
            self._served_tokens *= fade
        self._counted_until_s = now_s
