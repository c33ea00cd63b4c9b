"""What lies beside a tensor model's graph: class names, warm-up data, initial states.

Floor 4. Names were checked as plain when the config was read; links must not lead out of the model's folder.
"""

import math
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc.model_config_pb2 import DataType

from sardonyx.errors import ConfigError, ServeError
from sardonyx.repository.tensor_config import StateTensor, TensorConfig, WarmupInput, WarmupSample
from sardonyx.runners.tensors import Control, Reshape, State, TensorGraph, TensorModelRunner
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.tensors import SequenceControl, TensorBatch, TensorRequest, TensorRow, TensorSequence

MAX_LABEL_BYTES = 16 << 20
MAX_STATE_ELEMENTS = 1 << 28
"""Of one initial state. It lives as long as the model, and again for each sequence."""
_RANDOM_SEED = 0


def read_labels(tensors: TensorConfig, folder: Path) -> dict[str, list[str]]:
    """Class names of each output that has a file of them.

    Raises:
        ConfigError: a file that is missing, elsewhere or too large.
    """
    return {
        spec.name: _read(folder, spec.label_filename, MAX_LABEL_BYTES).decode(errors="replace").splitlines()
        for spec in tensors.outputs
        if spec.label_filename
    }


def tensor_graph(tensors: TensorConfig, folder: Path) -> TensorGraph:
    """What the runner must know.

    Raises:
        ConfigError: a file of an initial state is missing or of another size.
    """
    specs = (*tensors.inputs, *tensors.outputs)
    sequences = tensors.sequences
    return TensorGraph(
        is_batching=tensors.max_batch_size > 0,
        reshapes={spec.name: Reshape(spec.dims, spec.reshape) for spec in specs if spec.reshape is not None},
        controls=tuple(
            Control(
                name=each.name,
                kind=each.kind,
                datatype=kserve_datatype(each.data_type),
                false_value=each.false_value,
                true_value=each.true_value,
            )
            for each in (sequences.controls if sequences else ())
        ),
        states=tuple(
            State(each.input_name, each.output_name, _initial_state(each, folder))
            for each in (sequences.states if sequences else ())
        ),
    )


def warm_up(runner: TensorModelRunner, tensors: TensorConfig, folder: Path) -> None:
    """Run the samples of the config, in order, on each instance.

    Raises:
        ConfigError: a sample's file does not suit it, or a run failed.
    """
    for sample in tensors.warmup:
        # Each row of a stateful model's batch is a sequence of its own.
        num_rows = sample.batch_size if tensors.sequences else 1
        request = TensorRequest(
            id=-1,
            inputs={
                each.name: _warm_up_input(each, sample.batch_size // num_rows, tensors, folder)
                for each in sample.inputs
            },
            outputs=tuple(spec.name for spec in tensors.outputs),
            batch_size=sample.batch_size // num_rows,
            sequence=SequenceControl(id=1, is_start=True, is_end=True) if tensors.sequences else None,
        )
        for instance in range(len(tensors.instances)):
            for _ in range(sample.count):
                _run_sample(runner, sample, request, num_rows, instance)


def _run_sample(
    runner: TensorModelRunner, sample: WarmupSample, request: TensorRequest, num_rows: int, instance: int
) -> None:
    sequences = [TensorSequence(id=1) if request.sequence else None for _ in range(num_rows)]
    try:
        output = runner.execute(TensorBatch([TensorRow(request, sequence) for sequence in sequences]), instance)
        for result in output.results:
            if isinstance(result, ServeError):
                raise result
    except ServeError as error:
        raise ConfigError(f"warm-up sample '{sample.name}' failed: {error.message}", field="model_warmup") from error


def _warm_up_input(each: WarmupInput, batch_size: int, tensors: TensorConfig, folder: Path) -> npt.NDArray[Any]:
    datatype = kserve_datatype(each.data_type)
    if each.source == "file":
        array = _from_file(folder, f"warmup/{each.file_name}", datatype, each.dims)
    elif each.source == "random":
        array = _random(datatype, each.dims)
    else:
        array = zeros(datatype, each.dims)
    return np.repeat(array[np.newaxis], batch_size, axis=0) if tensors.max_batch_size else array


def _initial_state(state: StateTensor, folder: Path) -> npt.NDArray[Any]:
    if math.prod(state.initial_dims) > MAX_STATE_ELEMENTS:
        raise ConfigError(
            f"the initial state of '{state.input_name}' has more than {MAX_STATE_ELEMENTS:,} elements",
            field="sequence_batching.state",
        )
    datatype = kserve_datatype(state.data_type)
    if state.initial_file is None:
        return zeros(datatype, state.initial_dims)
    return _from_file(folder, f"initial_state/{state.initial_file}", datatype, state.initial_dims)


def zeros(datatype: str, dims: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.full(dims, "", object) if datatype == "BYTES" else np.zeros(dims, DATATYPES[datatype].array)


def _random(datatype: str, dims: tuple[int, ...]) -> npt.NDArray[Any]:
    """Any values; the same at each load."""
    random = np.random.default_rng(_RANDOM_SEED)
    dtype = DATATYPES[datatype].array
    if datatype == "BYTES":
        return zeros(datatype, dims)
    if datatype.startswith("FP"):
        return random.random(dims).astype(dtype)
    if datatype == "BF16":
        return (random.random(dims, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if datatype == "BOOL":
        return random.integers(0, 2, dims).astype(np.bool_)
    return np.frombuffer(random.bytes(math.prod(dims) * dtype.itemsize), dtype).reshape(dims)


def _from_file(folder: Path, name: str, datatype: str, dims: tuple[int, ...]) -> npt.NDArray[Any]:
    """Raw little-endian bytes, as the binary extension has them."""
    count = math.prod(dims)
    if datatype == "BYTES":
        texts = _texts(_read(folder, name, MAX_LABEL_BYTES), name)
        if len(texts) != count:
            raise ConfigError(f"holds {len(texts)} strings, {count} are needed", file=name)
        array = np.empty(count, object)
        array[:] = texts
        return array.reshape(dims)
    dtype = DATATYPES[datatype].array
    data = _read(folder, name, count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise ConfigError(f"holds {len(data):,} bytes, {count * dtype.itemsize:,} are needed", file=name)
    return np.frombuffer(data, dtype).reshape(dims)


def _texts(data: bytes, name: str) -> list[str]:
    texts, position = [], 0
    while position < len(data):
        length = struct.unpack_from("<I", data.ljust(position + 4, b"\xff"), position)[0]
        if position + 4 + length > len(data):
            raise ConfigError("ends inside a string", file=name)
        texts.append(data[position + 4 : position + 4 + length].decode(errors="replace"))
        position += 4 + length
    return texts


def _read(folder: Path, name: str, max_bytes: int) -> bytes:
    """A file of the model's folder that has so many bytes at most."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError("is a link that leads out of the model's folder", file=str(path))
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise ConfigError("is not a regular file", file=str(path))
        if status.st_size > max_bytes:
            raise ConfigError(f"is larger than {max_bytes:,} bytes", file=str(path))
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error


def kserve_datatype(data_type: int) -> str:
    """The protocol's word for a number of ModelConfig's enum."""
    name: str = DataType.Name(data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
