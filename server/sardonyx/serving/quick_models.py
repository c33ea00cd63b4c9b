"""Which tensor models are run where their requests are read, on the event loop.

Floor 4. For models of a few microseconds the way to an instance's thread and back is most of an inference
(`engine.instances` has the numbers). The event loop may not compute for more than a millisecond, so a model must be
quick by its graph, for every input that it takes, and by measurement.
"""

import math
import time
from pathlib import Path

from sardonyx.errors import EngineError
from sardonyx.repository.tensor_config import TensorConfig
from sardonyx.runners.tensors import TensorModelRunner
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx.runtime.quick_graphs import has_bounded_work
from sardonyx.serving.tensor_files import kserve_datatype, zeros
from sardonyx.tensors import TensorBatch, TensorRequest, TensorRow

MAX_RUN_S = 100e-6
"""Of the largest batch."""
MAX_INPUT_BYTES = 16 << 10
"""Of the largest batch: what could be made of it by broadcasting stays within some milliseconds."""
_NUM_RUNS = 7


def is_quick(runner: TensorModelRunner, tensors: TensorConfig, path: Path) -> bool:
    """Every inference of the model is over in a moment.

    Args:
        runner: of the model; runs a few times.
        tensors: the model's config.
        path: of its graph.
    """
    specs = (*tensors.inputs, *tensors.outputs)
    if tensors.sequences is not None or any(instance.kind != "cpu" for instance in tensors.instances):
        return False
    if any(spec.is_optional or kserve_datatype(spec.data_type) == "BYTES" for spec in specs):
        return False
    if any(-1 in spec.dims for spec in tensors.inputs) or _num_input_bytes(tensors) > MAX_INPUT_BYTES:
        return False
    return has_bounded_work(path) and _run_s(runner, tensors) <= MAX_RUN_S


def _num_input_bytes(tensors: TensorConfig) -> int:
    return max(1, tensors.max_batch_size) * sum(
        math.prod(spec.dims) * DATATYPES[kserve_datatype(spec.data_type)].array.itemsize for spec in tensors.inputs
    )


def _run_s(runner: TensorModelRunner, tensors: TensorConfig) -> float:
    """The shortest of a few runs of the largest batch: what the model takes where nothing disturbs it."""
    batch = (tensors.max_batch_size,) if tensors.max_batch_size else ()
    request = TensorRequest(
        id=-1,
        inputs={spec.name: zeros(kserve_datatype(spec.data_type), (*batch, *spec.dims)) for spec in tensors.inputs},
        outputs=tuple(spec.name for spec in tensors.outputs),
        batch_size=max(1, tensors.max_batch_size),
    )
    times_s = []
    for _ in range(_NUM_RUNS):
        started_s = time.perf_counter()
        try:
            runner.execute(TensorBatch([TensorRow(request)]), 0)
        except EngineError:  # zeros are no input that it likes; whoever calls will see what it does like
            return math.inf
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)
