"""The classifier that an operator has put between an image model and its callers. Floor 4."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sardonyx.errors import InvalidRequest, ModelNotReady, ServeError
from sardonyx.processing.picture import encode_picture
from sardonyx.serving.moderation import ModerationItem, Moderator
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.task_finder import Judge
from sardonyx.serving.tasks import ImageClassifyTask

MODERATION_BLOCKED = "moderation_blocked"
"""OpenAI's code."""

FindJudge = Callable[[str], Judge]
"""As `task_finder.TaskFinder.judge`."""


class PictureModerator:
    """Looks at every picture before it is given out, previews among them.

    Args:
        owner: the image model's name, for messages.
        name: of the classifier.
        find: where it is found, anew each time: it may have been loaded again.
        pool: where pictures are encoded.
    """

    def __init__(self, owner: str, name: str, find: FindJudge, pool: WorkerPool) -> None:
        self._owner = owner
        self._name = name
        self._find = find
        self._pool = pool

    def judge(self) -> ImageClassifyTask:
        """The classifier.

        Raises:
            ModelNotReady: it is not there, or judges no pictures. Without it no picture is given out.
        """
        try:
            judge = self._find(self._name)
        except ServeError as error:
            raise self._missing(error.message) from None
        if not isinstance(judge, ImageClassifyTask):
            raise self._missing(f"{self._name} judges texts only")
        return judge

    async def check(self, pixels: npt.NDArray[np.uint8], *, timeout_s: float) -> None:
        """Judge a picture, (Y, X, 3).

        Raises:
            InvalidRequest: it is flagged.
            ServeError: it could not be judged.
        """
        moderator = Moderator([self.judge()])
        data = await self._pool.run(encode_picture, pixels, "png", 100)
        (verdict,) = await moderator.judge([ModerationItem(images=[data])], timeout_s=timeout_s)
        if verdict.is_flagged:
            raise InvalidRequest(
                "the picture was blocked by this server's moderation; ask for something else", code=MODERATION_BLOCKED
            )

    def _missing(self, reason: str) -> ModelNotReady:
        return ModelNotReady(f"model {self._owner} gives out nothing without its moderator: {reason}")
