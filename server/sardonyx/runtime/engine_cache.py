"""Where engines of TensorRT lie on disk, so that only the first load of a graph on a kind of card builds one.

Floor 2. ONNX Runtime names an engine by the names in its graph, not by the weights: after a new export of the same
network it would take the old weights' engine. So each engine has a folder of its own here, named by all that it
depends on. It is built in a folder beside, which gets that name when the session is open: a process that dies while it
builds leaves nothing that looks like an engine.

Source: ONNX Runtime, docs/execution-providers/TensorRT-ExecutionProvider.md, "TensorRT EP Caches" and "EPContext".
"""

import hashlib
import mmap
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.repository.tensorrt_versions import Version, shown
from sardonyx.runtime.external_data import ExternalData, external_data

_ENGINES = "*.engine"
_PARTIAL = ".partial"
_PARTIAL_AGE_S = 86_400.0
"""A folder that was begun so long ago belongs to no process that still builds."""
_NOT_PART_OF_ENGINE = frozenset(
    {
        "device_id",
        "trt_cuda_graph_enable",
        "trt_detailed_build_log",
        "trt_dump_ep_context_model",
        "trt_dump_subgraphs",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_ep_context_embed_mode",
        "trt_ep_context_file_path",
        "trt_force_sequential_engine_build",
        "trt_force_timing_cache",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
    }
)
"""Options that change where things lie, or how a session runs, but not the engine."""


class EngineKey(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine depends on."""

    graph: str
    """SHA-256 of the model file and its external data; see `hash_graph`."""
    options: Mapping[str, str]
    """ONNX Runtime's, of the provider; what does not change the engine is left out of the name."""
    tensorrt: Version
    onnx_runtime: str
    compute_capability: int

    @property
    def name(self) -> str:
        """Of the engine's folder; readable as far as it helps whoever cleans up."""
        kept = sorted((key, value) for key, value in self.options.items() if key not in _NOT_PART_OF_ENGINE)
        options = hashlib.sha256(msgspec.json.encode(kept)).hexdigest()
        parts = (
            self.graph[:16],
            f"ort{self.onnx_runtime}",
            f"trt{shown(self.tensorrt)}",
            f"sm{self.compute_capability}",
        )
        return "-".join((*parts, options[:8]))


class EngineFiles:
    """One engine's folder, while its session is opened. End with `keep` or `discard`."""

    path: Path
    """What to open: the graph, or the model with an engine in it that an earlier load has written."""
    options: dict[str, str]
    """ONNX Runtime's, with the places of everything that the provider reads or writes."""
    is_built: bool
    """An earlier load has built the engine."""

    def __init__(self, graph: Path, folder: Path, options: Mapping[str, str], timing: Path, prefix: str) -> None:
        self._folder = folder
        self._partial: Path | None = None
        self.path, self.options = graph, dict(options)
        self.is_built = next(folder.glob(_ENGINES), None) is not None
        context = folder / _context_name(graph, options)
        wants_context = options.get("trt_dump_ep_context_model") == "1"
        if wants_context and context.is_file():
            self.path, self.is_built = context, True
        if not self.is_built:
            self._partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_PARTIAL}-", dir=folder.parent))
        place = self._partial or folder
        self.options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(place)}
        self.options.setdefault("trt_engine_cache_prefix", prefix)
        if self.options.setdefault("trt_timing_cache_enable", "1") == "1":
            timing = Path(self.options.setdefault("trt_timing_cache_path", str(timing)))
            timing.mkdir(parents=True, exist_ok=True)  # the provider makes the last folder only
        for name in ("trt_dump_ep_context_model", "trt_ep_context_file_path"):
            self.options.pop(name, None)
        if wants_context and not self.is_built:
            # The provider wants engines below the folder of such a model, at a relative path: here beside it.
            self.options |= {
                "trt_dump_ep_context_model": "1",
                "trt_ep_context_file_path": str(place / context.name),
                "trt_engine_cache_path": "",
            }

    def keep(self) -> None:
        """The session is open: later loads have what this one built."""
        if self._partial is None:
            return
        with suppress(OSError):  # another process was faster, and its engine is as good
            if self._folder.is_dir() and next(self._folder.iterdir(), None) is None:
                self._folder.rmdir()
            self._partial.rename(self._folder)
        self.discard()

    def discard(self) -> None:
        """Remove what was not kept."""
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None


def prepare_engine(root: Path, model: str, role: str, graph: Path, key: EngineKey) -> EngineFiles:
    """The folder of an engine, made where there is none.

    Args:
        root: of the cache.
        model: whose engine it is.
        role: of the graph, among the model's.
        graph: the ONNX file.
        key: with the options that the session is to be opened with.

    Raises:
        ConfigError: the cache's folder cannot be written.
    """
    timing = root / f"timing-trt{shown(key.tensorrt)}"
    parent = root / _plain(model)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, time.time())
        prefix = _plain(f"{model}_{role}")
        return EngineFiles(graph, parent / f"{_plain(role)}-{key.name}", key.options, timing, prefix)
    except OSError as error:
        reason = f"{root} cannot be written: {error.strerror}; engines of TensorRT are kept there"
        raise ConfigError(reason, field="engine_cache") from error


def hash_graph(path: Path) -> str:
    """SHA-256 of a model file and of all external data that it names, which `check_external_data` has passed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
        locations = sorted({entry.location for entry in _mapped(file)})
    for location in locations:
        with (path.parent / location).open("rb") as file:
            digest.update(location.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _mapped(file: BinaryIO) -> Iterator[ExternalData]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from external_data(data)


def _context_name(graph: Path, options: Mapping[str, str]) -> str:
    given = PurePosixPath(options.get("trt_ep_context_file_path", "")).name
    return given if given.endswith(".onnx") else f"{graph.stem}_ctx.onnx"


def _remove_abandoned(folder: Path, now: float) -> None:
    for each in folder.glob(f"*{_PARTIAL}-*"):
        with suppress(OSError):
            if now - each.stat().st_mtime > _PARTIAL_AGE_S:
                shutil.rmtree(each, ignore_errors=True)


def _plain(name: str) -> str:
    """Fit for a file name; names that become alike are told apart by the graph's hash."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]
