"""Sessions of graphs that may run on TensorRT: profile, engine cache, and what is being built meanwhile.

Floor 4. An engine takes minutes, and all of a card. So builds wait for each other, and whoever asks for the model reads
which of its graphs is being built, and for how long. A graph without TensorRT is just opened.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.repository.graph_check import GraphTensor
from sardonyx.repository.tensorrt_shapes import (
    SHAPE_OPTIONS,
    OpenBounds,
    Profile,
    derive_profile,
    profile_options,
    read_profile,
)
from sardonyx.repository.tensorrt_versions import Version, check_version
from sardonyx.runtime import session as sessions
from sardonyx.runtime import tensorrt_library
from sardonyx.runtime.engine_cache import EngineFiles, EngineKey, hash_graph, prepare_engine
from sardonyx.runtime.external_data import check_external_data
from sardonyx.runtime.graph_inputs import DeclaredGraph, read_graph
from sardonyx.runtime.providers import ORT_VERSION
from sardonyx.runtime.session import Session, SessionConfig

_FIELD = "optimization.execution_accelerators.gpu_execution_accelerator"


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What engines on a card depend on, beside graph and options."""

    tensorrt: Version
    compute_capability: int
    onnx_runtime: str = ORT_VERSION


class GraphPlace(msgspec.Struct, frozen=True, kw_only=True):
    """One graph that is to be opened."""

    path: Path
    model: str
    role: str = "model"
    number: int = 1
    """Of the model's graphs, from 1."""
    total: int = 1
    file: str = "config.pbtxt"
    """How errors call the model's config."""
    bounds: OpenBounds = {}
    """See `tensorrt_bounds`."""
    is_alone: bool = True
    """The model has no other graph, so shapes that the operator gives are all this one's."""


class _Work(msgspec.Struct, frozen=True):
    text: str
    started_s: float


def read_facts(device_id: int) -> EngineFacts:
    """Of a card and the libraries here.

    Raises:
        ConfigError: TensorRT or the card cannot be used.
    """
    return EngineFacts(
        tensorrt=tensorrt_library.tensorrt_version(),
        compute_capability=tensorrt_library.compute_capability(device_id),
    )


class Engines:
    """Opens sessions in loading threads; `progress` may be asked from any other.

    Args:
        root: of the engine cache; made when it is needed.
        metrics: told of builds, and of engines that were there.
        facts: of a card; ``None``: `read_facts`.
        now_s: monotonic.
    """

    def __init__(
        self,
        root: Path,
        metrics: Metrics,
        *,
        facts: Callable[[int], EngineFacts] | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._metrics = metrics
        self._facts = facts or read_facts
        self._now_s = now_s
        self._building = threading.Lock()
        self._work: dict[str, _Work] = {}
        """By model, which one load at a time works on."""

    def progress(self, model: str) -> str:
        """What a load of the model is waiting for now; empty where it builds nothing."""
        work = self._work.get(model)
        return "" if work is None else f"{work.text}, {max(0.0, self._now_s() - work.started_s):.0f} s"

    def open(self, place: GraphPlace, config: SessionConfig) -> Session:
        """Open a graph; on TensorRT with its engine, from the cache or built now.

        Raises:
            ConfigError: as `open_session`; or the options do not suit the installed TensorRT, an input has no bounds,
                the cache cannot be written.
        """
        tensorrt = next((each for each in config.providers if each.name == "tensorrt"), None)
        if tensorrt is None:
            return sessions.open_session(place.path, model_name=place.model, config=config)
        facts = self._facts(int(tensorrt.options.get("device_id", "0")))
        check_external_data(place.path)
        graph = read_graph(place.path)
        options = _options(place, graph, tensorrt.options, facts.tensorrt)
        if graph.is_compiled or options.get("trt_engine_cache_enable") == "0":
            with self._telling(place, "loading" if graph.is_compiled else "building"):
                return _open(place, place.path, config, options)
        key = EngineKey(
            graph=hash_graph(place.path),
            options=options,
            tensorrt=facts.tensorrt,
            onnx_runtime=facts.onnx_runtime,
            compute_capability=facts.compute_capability,
        )
        root = Path(options.get("trt_engine_cache_path") or self._root)
        files = prepare_engine(root, place.model, place.role, place.path, key)
        try:
            return self._open_cached(place, config, files)
        finally:
            files.discard()

    def _open_cached(self, place: GraphPlace, config: SessionConfig, files: EngineFiles) -> Session:
        metrics = self._metrics.model(place.model)
        if files.is_built:
            session = _open(place, files.path, config, files.options)
            metrics.count_engine_hit()
            return session
        with self._telling(place, "waiting to build"), self._building, self._telling(place, "building"):
            started_s = self._now_s()
            session = _open(place, files.path, config, files.options)
            files.keep()
            metrics.count_engine_build(self._now_s() - started_s)
        return session

    @contextmanager
    def _telling(self, place: GraphPlace, doing: str) -> Iterator[None]:
        before = self._work.get(place.model)
        text = f"{doing} the TensorRT engine of {place.role}, {place.number} of {place.total}"
        self._work[place.model] = _Work(text, self._now_s())
        try:
            yield
        finally:
            if before is None:
                del self._work[place.model]
            else:
                self._work[place.model] = before


def _options(place: GraphPlace, graph: DeclaredGraph, options: dict[str, str], version: Version) -> dict[str, str]:
    """Those that suit this version, with a profile for every open input."""
    kept = {name: value for name, value in options.items() if name not in SHAPE_OPTIONS}
    try:
        check_version(options, version)
        if graph.is_compiled:
            return kept
        return kept | profile_options(_profile(place, graph, read_profile(options)))
    except ValueError as error:
        raise ConfigError(f"{place.role}: {error}", file=place.file, field=_FIELD) from error


def _profile(place: GraphPlace, graph: DeclaredGraph, given: Profile) -> Profile:
    inputs = [GraphTensor(each.name, 0, each.dims, each.is_initializer) for each in graph.inputs]
    if place.is_alone and (odd := sorted(given.keys() - {each.name for each in inputs})):
        raise ValueError(f"{SHAPE_OPTIONS[0]}: the graph has no input {odd[0]!r}")
    return derive_profile(inputs, place.bounds, given)


def _open(place: GraphPlace, path: Path, config: SessionConfig, options: dict[str, str]) -> Session:
    providers = tuple(replace(each, options=options) if each.name == "tensorrt" else each for each in config.providers)
    return sessions.open_session(path, model_name=place.model, config=replace(config, providers=providers))
