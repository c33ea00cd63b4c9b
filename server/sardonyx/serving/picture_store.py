"""Pictures that are fetched later, by a URL. Floor 4, on the event loop: plain synchronous calls."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

KEPT_S = 3600.0
"""As long as OpenAI's URLs are good."""
_ENTRY_BYTES = 1024
"""What Python keeps for an entry besides the picture, rounded up."""


class StoredPicture(NamedTuple):
    """An encoded picture."""

    data: bytes
    media_type: str


class PictureStore:
    """The pictures that were put in or fetched last, as many as fit, each for an hour.

    Args:
        max_bytes: of all of them, bookkeeping among it.
        clock: monotonic seconds.
    """

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._pictures: OrderedDict[str, tuple[StoredPicture, float]] = OrderedDict()
        """With the time at which it goes; the one used last is last."""
        self.size_bytes = 0

    @property
    def num_pictures(self) -> int:
        return len(self._pictures)

    def add(self, picture: StoredPicture, *, suffix: str = "") -> str | None:
        """Keep a picture.

        Args:
            picture: what `get` gives.
            suffix: of its name, ``.png``.

        Returns:
            Its name, which nobody guesses: 128 random bits. ``None``: it is larger than the whole store.
        """
        self._drop_old()
        size_bytes = _size_bytes(picture)
        if size_bytes > self._max_bytes:
            return None
        while self.size_bytes + size_bytes > self._max_bytes:
            self._drop(next(iter(self._pictures)))
        name = f"{secrets.token_hex(16)}{suffix}"
        self._pictures[name] = (picture, self._clock() + KEPT_S)
        self.size_bytes += size_bytes
        return name

    def get(self, name: str) -> StoredPicture | None:
        """A picture by its name; ``None``: it is not there any more, or never was."""
        self._drop_old()
        if name not in self._pictures:
            return None
        self._pictures.move_to_end(name)
        return self._pictures[name][0]

    def _drop_old(self) -> None:
        now_s = self._clock()
        for name in [name for name, (_, until_s) in self._pictures.items() if until_s <= now_s]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        picture, _ = self._pictures.pop(name)
        self.size_bytes -= _size_bytes(picture)


def _size_bytes(picture: StoredPicture) -> int:
    return len(picture.data) + _ENTRY_BYTES
