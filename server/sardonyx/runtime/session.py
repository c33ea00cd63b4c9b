"""Sessions: how this process opens and runs ONNX graphs.

Floor 2, and with its neighbours in this package the only importer of ONNX Runtime. What crosses the border are numpy
arrays, our error tree and the standard logger: ONNX Runtime's own texts hold paths and node names, so they go to the
log ``sardonyx.onnxruntime`` and never into a message.
"""

import contextlib
import ctypes
import functools
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from sardonyx.errors import ConfigError, EngineError
from sardonyx.runtime.dtypes import Datatype, from_ort_name
from sardonyx.runtime.external_data import check_external_data
from sardonyx.runtime.function_check import check_functions
from sardonyx.runtime.placement import NO_FALLBACK_ENTRY, RECORD_ENTRY, check_placement, refused_cpu
from sardonyx.runtime.providers import ExecutionProvider, execution_provider

_ort_logger = logging.getLogger("sardonyx.onnxruntime")
_LOG_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)

BOUNDED_SPIN_US = 20
"""How long an idle pool thread looks for work before it sleeps, unless spinning was asked for.

Steps a second of a 135M decoder, int4, P = 100, 2 threads on 2 cores, runs back to back, best of three seconds:

    spin                          never   20 us   ORT's default   global pool
    1 row                            93     130             131           135
    8 rows                           38      46              45            46
    two models, 8 rows each          48      44              36            41
    8 rows, a core taken away        25      22              16            15

ORT's default spins on for 25 ms, and while it spins it keeps cores from whoever they wait for. Never spinning puts
two context switches under each of some 150 operators. 20 us has nearly the best of each. The process-global pool
(``set_global_thread_pool_sizes``) would bound the threads of several models at work together, but in ORT 1.32 its
spinning can be neither bounded nor stopped from Python: session options do not reach it (measured: 28 ms of CPU
after each run, with every one of them). So each session has a pool of its own; sleeping threads cost nothing.
"""


@dataclass(frozen=True, slots=True)
class _Threads:
    num_threads: int
    allow_spinning: bool


_threads = _Threads(num_threads=1, allow_spinning=False)


def configure_threads(num_threads: int, *, allow_spinning: bool) -> None:
    """Set the thread pool of every session that is opened from now on. Process-wide; call it before the first session.

    Args:
        num_threads: that work on one operator, the calling thread among them. At least 1. Until this is called it is 1.
        allow_spinning: let idle pool threads spin as long as ONNX Runtime likes, for a machine that serves one model
            and nothing else. See `BOUNDED_SPIN_US`.
    """
    global _threads
    _threads = _Threads(num_threads, allow_spinning)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a graph."""

    name: str
    datatype: Datatype
    shape: tuple[int | str | None, ...]
    """A number, or a symbol or ``None`` where any size goes."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How a session is opened where an operator may choose. What is ``None`` is the process's or ONNX Runtime's own."""

    providers: tuple[ExecutionProvider, ...] = ()
    """In the order in which they are asked for nodes; the CPU takes the rest. None: the CPU."""
    num_threads: int | None = None
    num_parallel_threads: int | None = None
    """Operators that run at once in parallel mode."""
    is_parallel: bool = False
    enable_arena: bool = True
    enable_mem_pattern: bool = False
    graph_level: int = 0
    """Triton's numbers: 0 all optimisations, 1 extended, -1 basic, 2 none."""
    session_entries: dict[str, str] = field(default_factory=dict)
    """ONNX Runtime's session config entries."""
    run_entries: dict[str, str] = field(default_factory=dict)
    """ONNX Runtime's run config entries."""
    is_strict: bool = False
    """Nothing but shapes may be computed on the CPU where another provider comes first."""


_GRAPH_LEVELS = {
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


_FOLDING_LIMIT = "optimization.constant_folding_max_output_size_in_bytes"
_LEAST_FOLDED_BYTES = 16 << 20
_MOST_FOLDED_BYTES = 1 << 30
"""ONNX Runtime's own limit."""


class Binding:
    """Inputs and outputs of a session bound by pointer, ready to run again and again.

    It keeps no reference to what is bound: the arrays must outlive it, and stay where they are.
    """

    def __init__(self, session: "Session", binding: Any) -> None:
        self._session = session
        self._binding = binding  # onnxruntime.IOBinding, which has no types

    def bind_input(self, name: str, array: npt.NDArray[Any]) -> None:
        """Read `name` from a C-contiguous host array at each run."""
        self._binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def bind_output(self, name: str, array: npt.NDArray[Any]) -> None:
        """Write `name` into a C-contiguous host array at each run. It must have the shape that the graph gives it."""
        self._binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Run the graph. Other Python threads go on meanwhile.

        Raises:
            EngineError: the session failed.
        """
        self._session.run_binding(self._binding)


class Session:
    """An open graph. Open one with `open_session`. `run` and `Binding.run` may be called by several threads."""

    def __init__(
        self,
        session: ort.InferenceSession,
        model_name: str,
        provider: ExecutionProvider,
        run_options: ort.RunOptions | None = None,
    ) -> None:
        self._session: ort.InferenceSession | None = session
        self.model_name = model_name
        self.provider = provider.name
        self._run_options = run_options
        self.inputs = {spec.name: spec for spec in map(_tensor_spec, session.get_inputs())}
        self.outputs = {spec.name: spec for spec in map(_tensor_spec, session.get_outputs())}
        self.optional_inputs = {
            spec.name: spec for spec in map(_tensor_spec, session.get_overridable_initializers()) if spec.name
        }
        """Initializers that a run may override."""
        specs = (self.inputs, self.outputs, self.optional_inputs)
        self._has_bf16 = any(spec.datatype.name == "BF16" for group in specs for spec in group.values())
        taken = (*self.inputs.values(), *self.optional_inputs.values())
        if self._has_bf16 and any(spec.datatype.name == "BYTES" for spec in taken):
            raise ConfigError("takes strings and has BF16, which ONNX Runtime's Python binding cannot pass together")

    def run(
        self, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Run the graph once on host arrays. Nothing is copied on the CPU: outputs are ONNX Runtime's own memory.

        Args:
            inputs: every input by name; BF16 as its bits in uint16, strings as objects of `str`.
            outputs: wanted ones; ``None``: all.

        Raises:
            EngineError: the session failed, or the inputs are not the graph's.
        """
        wanted = list(self.outputs if outputs is None else outputs)
        try:
            if self._has_bf16:
                values = self._run_bf16(wanted, inputs)
            else:
                values = self._open().run(wanted, inputs, self._run_options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise self.failed(error) from error
        return dict(zip(wanted, values, strict=True))

    def _run_bf16(self, wanted: list[str], inputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """For want of a bfloat16 in numpy, these tensors cross the border as memory."""
        feeds = {}
        for name, array in inputs.items():
            spec = self.inputs.get(name) or self.optional_inputs[name]
            if spec.datatype.name == "BF16":
                feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, spec.datatype.element_type)
            else:
                feeds[name] = ort.OrtValue.ortvalue_from_numpy(array)
        values = self._open().run_with_ort_values(wanted, feeds, self._run_options)
        return [_bits(value) if value.data_type() == "tensor(bfloat16)" else value.numpy() for value in values]

    def new_binding(self) -> Binding:
        """An empty binding of this session."""
        return Binding(self, self._open().io_binding())

    def new_io_binding(self) -> Any:
        """An empty ``onnxruntime.IOBinding``, for this package."""
        return self._open().io_binding()

    def run_binding(self, binding: Any, options: ort.RunOptions | None = None) -> None:
        """Run with an ``onnxruntime.IOBinding``: what `Binding.run` calls.

        Raises:
            EngineError: the session failed.
        """
        try:
            self._open().run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise self.failed(error) from error

    def close(self) -> None:
        """Free the session once its last binding is gone. It cannot run afterwards."""
        self._session = None
        _return_freed_memory()

    def _open(self) -> ort.InferenceSession:
        if self._session is None:
            raise EngineError(f"model {self.model_name} is unloaded")
        return self._session

    def failed(self, error: Exception) -> EngineError:
        """What callers are told of an error of ONNX Runtime's; it goes to the log. For this package."""
        if isinstance(error, EngineError):
            return error
        _ort_logger.error("model %s: %s", self.model_name, error)
        return EngineError(f"model {self.model_name} failed on the execution provider {self.provider}")


class KeptInputs:
    """Runs of a session some of whose inputs stay as they are for many runs. Used by one thread.

    ONNX Runtime copies an input to the session's device when it is bound, so what is kept crosses once, and what a run
    brings and its output cross in each. Nothing here is for strings and BF16.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._binding: Any = session.new_io_binding()  # onnxruntime.IOBinding, which has no types

    def keep(self, name: str, array: npt.NDArray[Any]) -> None:
        """Give `name` to every run from now on. On the CPU it is not copied: nobody may change it.

        Raises:
            EngineError: the graph has no such input, or the device has no room for it.
        """
        self._bind(name, array)

    def run(self, inputs: Mapping[str, npt.NDArray[Any]], output: str) -> npt.NDArray[Any]:
        """Run the graph once.

        Args:
            inputs: all that are not kept.
            output: the wanted one.

        Raises:
            EngineError: the session failed, or these and what is kept are not the graph's inputs.
        """
        for name, array in inputs.items():
            self._bind(name, array)
        binding = self._open()
        # Anew each time: the last run's output is bound otherwise, and its shape may be another.
        binding.clear_binding_outputs()
        binding.bind_output(output, "cpu")
        self._session.run_binding(binding)
        found: npt.NDArray[Any] = binding.get_outputs()[0].numpy()
        return found

    def close(self) -> None:
        """Free what is kept; the session stays open. Nothing runs afterwards."""
        self._binding = None

    def _bind(self, name: str, array: npt.NDArray[Any]) -> None:
        try:
            self._open().bind_cpu_input(name, np.ascontiguousarray(array))
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise self._session.failed(error) from error

    def _open(self) -> Any:
        if self._binding is None:
            raise EngineError(f"model {self._session.model_name} is unloaded")
        return self._binding


def open_session(path: Path, *, model_name: str, provider: str = "cpu", config: SessionConfig | None = None) -> Session:
    """Open a graph for serving.

    Its external data and its functions are checked first. A provider that cannot be set up, or leaves nodes to the CPU
    where that was not allowed, is an error and never replaced by another one in silence: a model that half runs on the
    wrong device looks like a slow one; see `placement.check_placement`. Memory patterns
    are off: ONNX Runtime keeps one for each combination of input shapes, and a packed step hardly ever has those of
    another.

    Args:
        path: of ``model.onnx``.
        model_name: for messages and logs.
        provider: a name that `execution_provider` knows.
        config: an operator's choices. Its providers replace `provider`, and leave nodes that they cannot run to the
            CPU, as Triton does, unless it is strict.

    Raises:
        ConfigError: the file or its external data is missing, unsafe or no ONNX graph that this build runs, or it does
            not run where it was asked to.
    """
    _prepare_process()
    config = config or SessionConfig()
    providers = config.providers or (execution_provider(provider),)
    resolved = providers[0]
    check_external_data(path)
    check_functions(path)
    options = _session_options(resolved, config)
    options.add_session_config_entry(_FOLDING_LIMIT, str(_max_folded_bytes(path)))
    if config.session_entries.get(NO_FALLBACK_ENTRY) == "1":
        providers = tuple(each for each in providers if each.name != "cpu")  # they contradict each other
    try:
        session = ort.InferenceSession(
            str(path),
            options,
            providers=[(each.ort_name, each.options) for each in providers],
            enable_fallback=0,
            read_config_from_model=0,
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        _ort_logger.error("model %s: %s", model_name, error)
        if (refusal := refused_cpu(error, providers)) is not None:
            raise ConfigError(refusal.reason, file=path.name) from error
        raise ConfigError(
            f"ONNX Runtime {ort.__version__} cannot open it on the execution provider {resolved.name}; the log says "
            "why",
            file=path.name,
        ) from error
    try:
        check_placement(session, providers, is_strict=config.is_strict)
        return Session(session, model_name, resolved, _run_options(config))
    except ConfigError as error:
        raise ConfigError(error.reason, file=path.name) from None


def _max_folded_bytes(path: Path) -> int:
    """What a node that ONNX Runtime computes ahead, while it opens the graph, may make.

    Its own limit is 1 GiB for each node, so a file of 2 KB (a constant doubled 30 times) took 2.5 GB and 22 s to open.
    Eight times the model's bytes is what unpacking int4 weights to float makes.
    """
    size_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    return min(max(_LEAST_FOLDED_BYTES, 8 * size_bytes), _MOST_FOLDED_BYTES)


def _session_options(provider: ExecutionProvider, config: SessionConfig) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = config.num_threads or _threads.num_threads
    options.inter_op_num_threads = config.num_parallel_threads or 1
    mode = ort.ExecutionMode
    options.execution_mode = mode.ORT_PARALLEL if config.is_parallel else mode.ORT_SEQUENTIAL
    options.graph_optimization_level = _GRAPH_LEVELS[config.graph_level]
    options.enable_cpu_mem_arena = config.enable_arena
    options.enable_mem_pattern = config.enable_mem_pattern
    options.log_severity_level = _ort_severity()
    # By content and not by file name: a graph in ORT's own format would get past the check of external data.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if not _threads.allow_spinning:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(BOUNDED_SPIN_US))
    if provider.name != "cpu":
        options.add_session_config_entry(RECORD_ENTRY, "1")
        if not config.providers:
            options.add_session_config_entry(NO_FALLBACK_ENTRY, "1")
    for key, value in config.session_entries.items():
        options.add_session_config_entry(key, value)
    return options


def _run_options(config: SessionConfig) -> ort.RunOptions | None:
    if not config.run_entries:
        return None
    options = ort.RunOptions()
    for key, value in config.run_entries.items():
        options.add_run_config_entry(key, value)
    return options


def _bits(value: Any) -> npt.NDArray[np.uint16]:
    """The bits of a bfloat16 OrtValue, copied: nothing would keep the value alive for a view."""
    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64))
    if size == 0:
        return np.empty(shape, np.uint16)
    memory = (ctypes.c_uint16 * size).from_address(value.data_ptr())
    return np.ctypeslib.as_array(memory).reshape(shape).copy()


def _return_freed_memory() -> None:
    """Give what the C heap holds free back to the system, where the C library can.

    glibc keeps freed weights otherwise: 140 of the demo model's 240 MB stayed with the process after an unload.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _tensor_spec(argument: Any) -> TensorSpec:
    try:
        return TensorSpec(argument.name, from_ort_name(argument.type), tuple(argument.shape))
    except ConfigError as error:
        raise ConfigError(f"{argument.name}: {error.reason}") from None
    except UnicodeDecodeError:
        raise ConfigError("names an input, an output or a dimension in other bytes than UTF-8") from None


@functools.cache
def _prepare_process() -> None:
    """Route ONNX Runtime's log, switch its telemetry off, load CUDA's libraries; once, since all are the process's."""
    ort.disable_telemetry_events()
    if hasattr(ort, "set_default_logger_callback"):
        ort.set_default_logger_callback(_log, _ort_severity())
    else:  # ONNX Runtime 1.31, the newest for CUDA on the package index, can only be told how much to print
        ort.set_default_logger_severity(_ort_severity())
    if "CUDAExecutionProvider" in ort.get_available_providers():
        # The wheels of CUDA and cuDNN put their libraries where no dynamic loader looks. What fails is printed.
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            ort.preload_dlls()
        for line in printed.getvalue().splitlines():
            _ort_logger.info("%s", line)


def _ort_severity() -> int:
    """Warnings and worse. ORT's "info" tells each graph transformation: some thousand lines for a model."""
    return 0 if _ort_logger.isEnabledFor(logging.DEBUG) else 2


def _log(severity: int, _category: str, _log_id: str, location: str, message: str) -> None:
    _ort_logger.log(_LOG_LEVELS[severity], "%s (%s)", message, location)
