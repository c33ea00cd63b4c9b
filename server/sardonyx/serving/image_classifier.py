"""Image classifiers: a score for each label. Floor 4. A `tasks.ImageClassifyTask`."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from sardonyx.errors import InvalidRequest
from sardonyx.processing.image import preprocess
from sardonyx.repository import families
from sardonyx.runners.images import INPUT, image_shape
from sardonyx.serving.activation import activate
from sardonyx.serving.item_calls import Item, ItemCalls
from sardonyx.serving.pool import WorkerPool
from sardonyx.serving.tasks import CategoryRule, Encoded

PARAM = "images"
"""What errors call the field that holds the pictures; ``images.1`` is the second."""


class ImageClassifier:
    """See `tasks.ImageClassifyTask`.

    Args:
        name: of the model.
        calls: belongs to the model from now on; its admission counts bytes.
        pool: where pictures are decoded; shared.
        image, labels: the manifest's.
        moderation: the operator's rules, by label.
    """

    def __init__(
        self,
        name: str,
        calls: ItemCalls,
        pool: WorkerPool,
        *,
        image: families.ImageInput,
        labels: families.Labels,
        moderation: Mapping[str, Sequence[CategoryRule]],
    ) -> None:
        self.name = name
        self.calls = calls
        self.labels: Sequence[str] = labels.names
        self.moderation = moderation
        self._pool = pool
        self._image = image
        self._activation = labels.activation
        self._prepared_bytes = math.prod(image_shape(image)) * np.dtype(np.float32).itemsize

    async def classify_images(self, images: Sequence[bytes], *, timeout_s: float | None = None) -> Encoded:
        """See `tasks.ImageClassifyTask.classify_images`."""
        if not images:
            raise InvalidRequest(f"{PARAM}: is empty; at least one picture is needed", param=PARAM)
        num_bytes = sum(map(len, images)) + len(images) * self._prepared_bytes
        async with self.calls.open(num_bytes, timeout_s=timeout_s) as call:
            # One by one: a picture takes long enough for others to have their turn between.
            items = [await self._pool.run(self._prepare, index, image) for index, image in enumerate(images)]
            values = np.stack(await call.run(items))
        return Encoded(values=activate(values, self._activation), num_tokens=0)

    def _prepare(self, index: int, image: bytes) -> Item:
        try:
            return Item(inputs={INPUT: preprocess(image, self._image)})
        except InvalidRequest as error:
            param = f"{PARAM}.{index}"
            raise InvalidRequest(f"{param}: {error.message}", param=param) from None
