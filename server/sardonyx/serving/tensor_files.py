"""What lies beside a tensor model's graph: class names, warm-up data, initial states.

Floor 4. Names were checked as plain when the config was read; links must not lead out of the model's folder.
"""

import math
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
_RANDOM_SEED = 0


def read_labels(tensors: TensorConfig, folder: Path) -> dict[str, list[str]]:
    """Class names of each output that has a file of them.

    Raises:
        ConfigError: a file that is missing, elsewhere, too large or not UTF-8.
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
        request = TensorRequest(
            id=-1,
            inputs={each.name: _warm_up_input(each, sample, tensors, folder) for each in sample.inputs},
            outputs=tuple(spec.name for spec in tensors.outputs),
            batch_size=sample.batch_size,
            sequence=SequenceControl(id=1, is_start=True, is_end=True) if tensors.sequences else None,
        )
        for instance in range(len(tensors.instances)):
            for _ in range(sample.count):
                sequence = TensorSequence(id=1) if tensors.sequences else None
                try:
                    runner.execute(TensorBatch([TensorRow(request, sequence)]), instance)
                except ServeError as error:
                    raise ConfigError(
                        f"warm-up sample '{sample.name}' failed: {error.message}", field="model_warmup"
                    ) from error


def _warm_up_input(each: WarmupInput, sample: WarmupSample, tensors: TensorConfig, folder: Path) -> npt.NDArray[Any]:
    datatype = kserve_datatype(each.data_type)
    if each.source == "file":
        array = _from_file(folder / "warmup", str(each.file_name), datatype, each.dims)
    elif each.source == "random":
        array = _random(datatype, each.dims)
    else:
        array = _zeros(datatype, each.dims)
    return np.repeat(array[np.newaxis], sample.batch_size, axis=0) if tensors.max_batch_size else array


def _initial_state(state: StateTensor, folder: Path) -> npt.NDArray[Any]:
    datatype = kserve_datatype(state.data_type)
    if state.initial_file is None:
        return _zeros(datatype, state.initial_dims)
    return _from_file(folder / "initial_state", state.initial_file, datatype, state.initial_dims)


def _zeros(datatype: str, dims: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.full(dims, "", object) if datatype == "BYTES" else np.zeros(dims, DATATYPES[datatype].array)


def _random(datatype: str, dims: tuple[int, ...]) -> npt.NDArray[Any]:
    """Any values; the same at each load."""
    random = np.random.default_rng(_RANDOM_SEED)
    dtype = DATATYPES[datatype].array
    if datatype == "BYTES":
        return _zeros(datatype, dims)
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
    """A file of the model's folder, and at most one byte more than may be."""
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError("is a link that leads out of its folder", file=str(path))
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    if len(data) > max_bytes:
        raise ConfigError(f"is larger than {max_bytes:,} bytes", file=str(path))
    return data


def kserve_datatype(data_type: int) -> str:
    """The protocol's word for a number of ModelConfig's enum."""
    name: str = DataType.Name(data_type).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name
