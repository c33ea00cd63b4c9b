"""How much of what costs us and moves nothing a client may send: token buckets.

Floor 5.

Source: CVE-2019-9512 to 9518 (floods), CVE-2023-44487 (rapid reset), CVE-2025-8671 (resets that a client provokes).
"""

from dataclasses import dataclass

from sardonyx.api.kserve.h2.frames import ConnectionFault, ErrorCode

CHATTER = (5000, 1000.0)
"""Frames that move nothing, such as PING: so many at once, and so many a second."""
RESETS = (4000, 1000.0)
"""Calls that their client takes back."""


@dataclass(slots=True)
class Budget:
    """Full at first. It has no clock of its own."""

    capacity: float
    per_s: float
    """How fast it fills up again."""
    at_s: float
    """The time of the last change."""
    left: float = 0.0

    def __post_init__(self) -> None:
        self.left = self.capacity

    def spend(self, now_s: float) -> None:
        """Take one.

        Raises:
            ConnectionFault: none is left.
        """
        self.left = min(self.capacity, self.left + (now_s - self.at_s) * self.per_s)
        self.at_s = now_s
        if self.left < 1:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many frames that move nothing")
        self.left -= 1
