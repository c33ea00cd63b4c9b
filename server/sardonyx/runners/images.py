"""Steps of image classifiers: prepared pictures, all of one shape, through one graph.

Floor 3. `repository.families.ImageInput` says what the graph takes; `processing.image` makes it.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx.errors import ConfigError, EngineError, ServeError
from sardonyx.repository.families import ImageInput
from sardonyx.runtime.session import Session
from sardonyx.tensors import InferenceTimes, TensorBatch, TensorOutput, TensorRequest

Array = npt.NDArray[Any]

INPUT = "image"
"""What a request calls its picture, of `image_shape`, float32; whatever the graph calls it."""
OUTPUT = "values"
"""What a picture's result is called, (labels,) float32."""
_FIELD = "graphs['model']"


class ImageClassifierRunner:
    """A `tensors.TensorRunner`: each request is a prepared picture.

    Args:
        sessions: of each instance; the same object for those that share it. Closed by `close`.
        image: from the manifest.
        num_labels: numbers of a result.

    Raises:
        ConfigError: the graph has not the input and output that the manifest says.
    """

    def __init__(self, sessions: Sequence[Session], image: ImageInput, num_labels: int) -> None:
        self._sessions = list(sessions)
        self._image = image
        self._num_labels = num_labels
        for session in dict.fromkeys(self._sessions):
            _check_input(session, image)
            _check_output(session, image, num_labels)

    def warm_up(self) -> None:
        """Run every session once, so that the first request does not wait for what ONNX Runtime does then.

        Raises:
            ConfigError: a graph does not run, or gives something else than its manifest says.
        """
        black = np.zeros(image_shape(self._image), np.float32)
        row = TensorRequest(id=0, inputs={INPUT: black}, outputs=(OUTPUT,))
        for session in dict.fromkeys(self._sessions):
            try:
                self._run(_stack([row, row]), session)
            except EngineError as error:
                raise ConfigError(f"does not run: {error.message}", field=_FIELD) from error

    def execute(self, batch: TensorBatch, instance: int) -> TensorOutput:
        """Run one step. A number that is not finite is the failure of its picture alone.

        Raises:
            EngineError: the session failed. Pictures differ in nothing that could make one of them the reason.
        """
        started_ns = time.perf_counter_ns()
        pictures = _stack(batch.requests)
        stacked_ns = time.perf_counter_ns()
        values = self._run(pictures, self._sessions[instance])
        ran_ns = time.perf_counter_ns()
        is_good = np.all(np.isfinite(values), axis=1).tolist()
        results: list[dict[str, Array] | ServeError] = [
            {OUTPUT: row} if good else EngineError("the model gave a number that is not finite")
            for row, good in zip(values, is_good, strict=True)
        ]
        times = InferenceTimes(stacked_ns - started_ns, ran_ns - stacked_ns, time.perf_counter_ns() - ran_ns)
        return TensorOutput(results, times)

    def close(self) -> None:
        """Free the sessions."""
        for session in dict.fromkeys(self._sessions):
            session.close()

    def _run(self, pictures: Array, session: Session) -> Array:
        """(B, labels) float32."""
        output = self._image.output
        values = session.run({self._image.name: pictures}, [output])[output]
        if values.shape != (len(pictures), self._num_labels):
            raise EngineError(
                f"output {output!r} of model {session.model_name} has the shape {list(values.shape)}; "
                f"[{len(pictures)}, {self._num_labels}] was expected"
            )
        return values


def image_shape(image: ImageInput) -> tuple[int, int, int]:
    """Of one prepared picture: (y, x, 3) or (3, y, x)."""
    height, width = image.crop
    return (height, width, 3) if image.layout == "NHWC" else (3, height, width)


def _stack(rows: list[TensorRequest]) -> Array:
    """(B, *image_shape) float32."""
    if len(rows) == 1:
        return rows[0].inputs[INPUT][None]
    return np.stack([row.inputs[INPUT] for row in rows])


def _check_input(session: Session, image: ImageInput) -> None:
    if set(session.inputs) != {image.name}:
        found = ", ".join(map(repr, session.inputs)) or "nothing"
        raise ConfigError(f"takes {found}; {image.name!r} alone was expected", field=_FIELD)
    spec = session.inputs[image.name]
    if spec.datatype.name != "FP32":
        raise ConfigError(f"takes {image.name!r} as {spec.datatype.name}; FP32 is needed", field=_FIELD)
    _check_shape(f"takes {image.name!r}", spec.shape, image_shape(image))


def _check_output(session: Session, image: ImageInput, num_labels: int) -> None:
    spec = session.outputs.get(image.output)
    if spec is None:
        found = ", ".join(session.outputs)
        raise ConfigError(f"has no output {image.output!r}; its outputs are {found}", field=_FIELD)
    if spec.datatype.name != "FP32":
        raise ConfigError(f"gives {image.output!r} as {spec.datatype.name}; FP32 is needed", field=_FIELD)
    _check_shape(f"gives {image.output!r}", spec.shape, (num_labels,))


def _check_shape(claim: str, shape: tuple[int | str | None, ...], row: tuple[int, ...]) -> None:
    """A graph's shape against that of a row. What it leaves open fits; the batch axis has to be open."""
    fits = len(shape) == len(row) + 1 and all(
        not isinstance(found, int) or found == size for found, size in zip(shape[1:], row, strict=True)
    )
    if not fits or isinstance(shape[0], int):
        shown = ["?" if each is None else each for each in shape]
        raise ConfigError(f"{claim} with the shape {shown}; ['B', {', '.join(map(str, row))}] is needed", field=_FIELD)
