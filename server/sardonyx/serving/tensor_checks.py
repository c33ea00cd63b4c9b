"""A call against the inputs and outputs of a tensor model: what does not suit is refused with Triton's words.

Floor 4. Pure. This runs for every request, so what can be known of a model beforehand is.
"""

from typing import Any

import numpy.typing as npt

from sardonyx.errors import InvalidRequest
from sardonyx.serving.served import InferCall
from sardonyx.serving.strings import to_text
from sardonyx.tensors import Tensor, TensorMetadata

_NOTE = (
    " NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)


class BoundCall:
    """A call as arrays of the model's inputs."""

    __slots__ = ("batch_key", "batch_size", "inputs", "num_bytes", "outputs")

    def __init__(self, inputs: dict[str, npt.NDArray[Any]], outputs: tuple[str, ...]) -> None:
        self.inputs = inputs
        """Strings are objects of `str`, unless asked otherwise."""
        self.outputs = outputs
        self.batch_size = 1
        self.batch_key: tuple[Any, ...] = ()
        self.num_bytes = 0


class TensorSignature:
    """The inputs and outputs of a model, ready to check calls against.

    Args:
        inputs: with batch axis where the model batches.
        max_batch_size: 0 where it does not.
    """

    def __init__(
        self,
        model_name: str,
        inputs: tuple[TensorMetadata, ...],
        outputs: tuple[TensorMetadata, ...],
        max_batch_size: int,
    ) -> None:
        self._model_name = model_name
        self._inputs = {each.name: each for each in inputs}
        self._required = frozenset(each.name for each in inputs if not each.is_optional)
        self._all_outputs = tuple(each.name for each in outputs)
        self._max_batch_size = max_batch_size
        first = int(max_batch_size > 0)
        self._is_uniform = not any(each.is_optional or -1 in each.shape[first:] for each in inputs)
        """Every call has the same inputs of the same shapes, so all of them can share a batch."""

    def bind(self, call: InferCall, *, as_text: bool = True) -> BoundCall:
        """Check a call and take it apart.

        Args:
            call: of this model.
            as_text: make strings of BYTES; without it they stay as they are.

        Raises:
            InvalidRequest: unknown, missing or repeated names, wrong datatypes or shapes, too large a batch, strings
                that are not UTF-8.
        """
        bound = BoundCall({}, self._wanted(call.outputs))
        for tensor in call.inputs:
            self._check_input(tensor)
            if tensor.name in bound.inputs:
                raise InvalidRequest(f"input '{tensor.name}' already exists in request", param="inputs")
            array = tensor.array
            if as_text and tensor.datatype == "BYTES":
                array, num_bytes = to_text(tensor)
                bound.num_bytes += num_bytes
            else:
                bound.num_bytes += array.nbytes
            bound.inputs[tensor.name] = array
        if not self._required <= bound.inputs.keys():
            raise self._missing(list(bound.inputs))
        if self._max_batch_size:
            bound.batch_size = self._batch_size(bound.inputs)
        if not self._is_uniform:
            first = int(self._max_batch_size > 0)
            bound.batch_key = tuple(sorted((name, array.shape[first:]) for name, array in bound.inputs.items()))
        return bound

    def _wanted(self, names: list[str]) -> tuple[str, ...]:
        for name in names:
            if name not in self._all_outputs:
                raise InvalidRequest(
                    f"unexpected inference output '{name}' for model '{self._model_name}'", param="outputs"
                )
        return tuple(names) if names else self._all_outputs

    def _check_input(self, tensor: Tensor) -> None:
        wanted = self._inputs.get(tensor.name)
        if wanted is None:
            raise InvalidRequest(
                f"unexpected inference input '{tensor.name}' for model '{self._model_name}'", param="inputs"
            )
        if tensor.datatype != wanted.datatype:
            raise InvalidRequest(
                f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{self._model_name}' "
                f"expects '{wanted.datatype}'",
                param="inputs",
            )
        shape, dims = tensor.array.shape, wanted.shape
        if shape != dims and (
            len(shape) != len(dims) or any(dim not in (-1, size) for size, dim in zip(shape, dims, strict=True))
        ):
            raise InvalidRequest(
                f"unexpected shape for input '{tensor.name}' for model '{self._model_name}'. "
                f"Expected {_show(dims)}, got {_show(shape)}.{_NOTE}",
                param="inputs",
            )

    def _batch_size(self, inputs: dict[str, npt.NDArray[Any]]) -> int:
        batch_size = -1
        for name, array in inputs.items():
            if batch_size not in (-1, array.shape[0]):
                raise InvalidRequest(
                    f"input '{name}' batch size does not match other inputs for '{self._model_name}'", param="inputs"
                )
            batch_size = array.shape[0]
        if batch_size > self._max_batch_size:
            raise InvalidRequest(
                f"inference request batch-size must be <= {self._max_batch_size} for '{self._model_name}'",
                param="inputs",
            )
        if batch_size == 0:
            raise InvalidRequest(f"inference request batch-size must be >= 1 for '{self._model_name}'", param="inputs")
        return max(1, batch_size)

    def _missing(self, given: list[str]) -> InvalidRequest:
        least, most = len(self._required), len(self._inputs)
        expected = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
        missing = sorted(self._required.difference(given))
        return InvalidRequest(
            f"expected {expected} but got {len(given)} inputs for model '{self._model_name}'. Got input(s) {given}, "
            f"but missing required input(s) {missing}. Please provide all required input(s).",
            param="inputs",
        )


def _show(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
