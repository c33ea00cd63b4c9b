"""A repository that lies in memory, with models that hold their calls for as long as a test likes."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ModelNotReady
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.override import check_override
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import InferAnswer, InferCall, LoadedModel, ModelOverride
from sardonyx.statistics import InferenceStatistics
from sardonyx.tensors import TensorMetadata

CALL = InferCall(inputs=[])


class FakeVersion:
    """A `served.ServedModel` that answers every call with its edition."""

    task = None
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()
    created = 0
    size_bytes = 0
    stalled_s = 0.0
    is_decoupled = False

    def __init__(self, name: str, version: int, edition: int, calls: "Callable[[], Awaitable[None]] | None") -> None:
        self.name = name
        self.version = version
        self.edition = edition
        """Which load made it."""
        self.config = ModelConfig(name=name)
        self.statistics = InferenceStatistics(name, version)
        self.is_alive = True
        self.is_closed = False
        self.num_active = 0
        self._calls = calls
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self.gate = asyncio.Event()
        """Calls wait while it is clear."""
        self.gate.set()

    def labels(self, output: str) -> list[str]:
        return []

    async def infer(self, call: InferCall) -> InferAnswer:
        if self._is_draining:
            raise ModelNotReady(f"{self.name} takes no more calls")
        self.num_active += 1
        self._is_idle.clear()
        try:
            await self.gate.wait()
            assert not self.is_closed, "a call was still under way"
            if self._calls is not None:
                await self._calls()
            return InferAnswer(outputs=[], parameters={"edition": self.edition})
        finally:
            self.num_active -= 1
            if not self.num_active:
                self._is_idle.set()

    async def stream(self, call: InferCall) -> AsyncIterator[InferAnswer]:
        yield await self.infer(call)

    def stop_generation(self, request_id: str | None = None) -> int:
        return 0

    async def drain(self, timeout_s: float) -> None:
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            return

    async def close(self) -> None:
        self._is_draining = self.is_closed = True


class FakeSource:
    """A `registry.ModelSource`. An ensemble's call goes to each of its parts in turn."""

    def __init__(self, *names: str, **ensembles: Iterable[str]) -> None:
        self.facts: dict[str, IndexEntry] = {}
        self.num_written = 0
        for name in names:
            self.write(name)
        for name, parts in ensembles.items():
            self.write(name, depends_on=tuple(parts))
        self.errors: dict[str, Exception] = {}
        """Raised by loads, by model."""
        self.index_error: Exception | None = None
        """Raised by looks at the repository."""
        self.gates: dict[str, threading.Event] = {}
        """Loads of a model wait while its gate is clear."""
        self.on_loaded: Callable[[str], None] = lambda _: None
        """Called in the loading thread before a model is put together, when its parts are known to be there."""
        self.loads: list[tuple[str, str]] = []
        """Models in the order of their loads, with the config that was brought along."""
        self.waits_for: dict[str, str] = {}
        """What loads wait for, by model."""
        self.made: list[FakeVersion] = []
        self.registry: Registry | None = None
        self._lock = threading.Lock()

    def write(self, name: str, **facts: object) -> None:
        """Put files of a model there, or change them."""
        self.num_written += 1
        given = {"versions": [1], "family": "tensors", "fingerprint": f"written {self.num_written}"} | facts
        self.facts[name] = IndexEntry(name=name, **given)  # type: ignore[arg-type]

    def hold(self, name: str) -> threading.Event:
        """Loads of a model wait until this is set."""
        self.gates[name] = threading.Event()
        return self.gates[name]

    def index(self) -> list[IndexEntry]:
        if self.index_error is not None:
            raise self.index_error
        return list(self.facts.values())

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        with self._lock:
            self.loads.append((name, override.config if override is not None else ""))
            edition = len(self.loads)
        if gate := self.gates.get(name):
            assert gate.wait(30)
        if name in self.errors:
            raise self.errors[name]
        facts = self.facts.get(name, IndexEntry(name=name, versions=[1]))
        depends_on = facts.depends_on
        if override is not None:
            depends_on = check_override(name, override).depends_on
        assert self.registry is not None
        for part in depends_on:
            self.registry.part(part)
        self.on_loaded(name)
        versions = {version: self._version(name, version, edition, depends_on) for version in facts.versions or [1]}
        return LoadedModel(versions=dict(versions), depends_on=depends_on)

    def _version(self, name: str, version: int, edition: int, depends_on: tuple[str, ...]) -> FakeVersion:
        async def call_parts() -> None:
            assert self.registry is not None
            for part in depends_on:
                await self.registry.part(part).infer(CALL)

        made = FakeVersion(name, version, edition, call_parts if depends_on else None)
        self.made.append(made)
        return made

    def progress(self, name: str) -> str:
        return self.waits_for.get(name, "")

    def close(self) -> None:
        """Models share nothing."""

    def loaded_names(self) -> list[str]:
        return [name for name, _ in self.loads]


def run(
    source: FakeSource,
    test: Callable[[Registry], Awaitable[None]],
    *,
    start: Iterable[str] | None = None,
    timeout_s: float = 60.0,
    **options: object,
) -> None:
    """Run a test on a registry. Afterwards every model that was ever loaded must be closed.

    Args:
        start: what to load first; ``None``: everything.
        timeout_s: a test that takes longer is stuck.
    """

    async def main() -> None:
        registry = source.registry = Registry(source, **options)  # type: ignore[arg-type]
        await registry.start(start)
        async with asyncio.timeout(timeout_s):
            await test(registry)
            for gate in source.gates.values():
                gate.set()
            for version in source.made:
                version.gate.set()
            await registry.close()
        assert all(version.is_closed for version in source.made)

    asyncio.run(main())


def rows(registry: Registry) -> list[tuple[object, ...]]:
    """The index: name, version, state and reason, without what is empty."""
    return [tuple(filter(None, msgspec.structs.astuple(row))) for row in registry.version_index()]


def states(registry: Registry) -> dict[str, str]:
    return {status.name: status.state for status in registry.list()}


async def edition(registry: Registry, name: str) -> object:
    """Which load answers now."""
    answer = await registry.served(name).infer(CALL)
    return answer.parameters["edition"]
