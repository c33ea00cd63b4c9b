"""How models come and go: loads that others wait for, reloads without a gap, unloads that finish what was accepted.

Floor 4. Part of the registry, on its event loop: sources are asked in worker threads, entries change between awaits.
"""

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from sardonyx.errors import ConfigError, ModelNotReady, ServeError
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.served import LoadedModel, ModelOverride, ServedModel
from sardonyx.serving.status import ModelState, safe_reason

logger = logging.getLogger(__name__)


class ModelSource(Protocol):
    """Where a registry gets its models. `serving.loader.ModelLoader` is one.

    `index` and `load` block, and run in worker threads.
    """

    def index(self) -> list[IndexEntry]:
        """Every model of the repositories, by name. Raises ConfigError without a repository."""
        ...

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        """A model as its version policy wants it, ready for requests: all of its versions, or an error.

        Raises:
            ServeError: it cannot be loaded; ConfigError names file and field.
        """
        ...

    def close(self) -> None:
        """Give back what the models shared. The last call."""
        ...


@dataclass(slots=True, eq=False)
class Entry:
    """One name of the registry. All but `lock` changes between awaits only."""

    facts: IndexEntry
    state: ModelState = ModelState.UNAVAILABLE
    reason: str = "not loaded"
    model: LoadedModel | None = None
    """What requests get; set exactly while READY."""
    override: ModelOverride | None = None
    """What the last load brought along."""
    is_needed: bool = False
    """Readiness waits for it."""
    was_wanted: bool = False
    """A load was begun at some time."""
    tried_fingerprint: str = ""
    """Of the files at the last load."""
    past_versions: set[int] = field(default_factory=set)
    """Served at some time, or meant to."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever loads or unloads."""
    loading: "asyncio.Task[LoadedModel] | None" = None
    """The load that others who ask for one may wait for as well."""


class Lifecycle:
    """Loads and unloads the registry's entries.

    Args:
        source: of models.
        entries: the registry's, by name.
        unload_timeout_s: how long a model that is unloaded or replaced may finish what it has.
        max_loads: at once.
    """

    def __init__(self, source: ModelSource, entries: dict[str, Entry], unload_timeout_s: float, max_loads: int) -> None:
        self.live: set[ServedModel] = set()
        """Loaded and not closed: those in place, and those that finish what they have."""
        self.is_closed = False
        self._source = source
        self._entries = entries
        self._unload_timeout_s = unload_timeout_s
        self._load_slots = asyncio.Semaphore(max_loads)
        self._tasks: set[asyncio.Task[Any]] = set()
        """Loads, unloads and closings under way. They go on when the caller who asked for them leaves."""

    async def close(self) -> None:
        """End everything and free every model. Idempotent."""
        self.is_closed = True
        await asyncio.gather(*(self.close_model(model) for model in list(self.live)))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def check_open(self) -> None:
        """Raise ModelNotReady once `close` was called."""
        if self.is_closed:
            raise ModelNotReady("the server is shutting down")

    def begin_load(self, entry: Entry, override: ModelOverride | None = None) -> "asyncio.Task[LoadedModel]":
        """The load under way, or a new one."""
        if entry.loading is None:
            entry.was_wanted = True
            if entry.state is ModelState.UNAVAILABLE:
                entry.state, entry.reason = ModelState.LOADING, ""
            entry.loading = self.spawn(self._load(entry, override or entry.override))
        return entry.loading

    async def _load(self, entry: Entry, override: ModelOverride | None) -> LoadedModel:
        try:
            async with entry.lock:
                self.check_open()
                if entry.model is None:
                    entry.state, entry.reason = ModelState.LOADING, ""
                entry.tried_fingerprint = entry.facts.fingerprint
                try:
                    await self._load_parts(entry)
                    async with self._load_slots:
                        model = await asyncio.to_thread(self._source.load, entry.facts.name, override)
                except Exception as error:
                    raise self._failure(entry, error) from error
                self.live.update(model.versions.values())
                if self.is_closed:
                    await self._retire(model)
                    self.check_open()
                self._put(entry, model, override)
                return model
        finally:
            entry.loading = None

    def _put(self, entry: Entry, model: LoadedModel, override: ModelOverride | None) -> None:
        """From here on requests get the new versions."""
        old, entry.model, entry.override = entry.model, model, override
        entry.past_versions.update(model.versions)
        entry.state, entry.reason = ModelState.READY, ""
        if old is not None:
            self.spawn(self._retire(old))

    async def _load_parts(self, entry: Entry) -> None:
        """Have the models that an ensemble is made of; whether they are ready is seen when it is put together."""
        if not entry.facts.depends_on:
            return
        if entry.facts.name in (parts := self.parts(entry)):
            raise ConfigError(f"circular dependency between ensembles: {entry.facts.name} -> {' -> '.join(parts)}")
        wanted = [self._entries[part] for part in entry.facts.depends_on if part in self._entries]
        loads = [self.begin_load(part) for part in wanted if part.model is None]
        await asyncio.gather(*loads, return_exceptions=True)

    def parts(self, entry: Entry) -> list[str]:
        """Names that an ensemble depends on, directly and through other ensembles."""
        found: list[str] = []
        rest = list(entry.facts.depends_on)
        while rest:
            name = rest.pop()
            if name not in found:
                found.append(name)
                if name in self._entries:
                    rest += self._entries[name].facts.depends_on
        return found

    def _failure(self, entry: Entry, error: Exception) -> ModelNotReady:
        """Note why a load failed."""
        name = entry.facts.name
        if isinstance(error, ServeError):
            logger.error("model %s cannot be loaded: %s", name, error)
            reason = safe_reason(error)
        else:
            logger.exception("model %s cannot be loaded", name)
            reason = "an internal error, see the log"
        if entry.model is None:
            entry.state, entry.reason = ModelState.UNAVAILABLE, reason
        else:
            serving = ", ".join(map(str, sorted(entry.model.versions)))
            entry.reason = f"version {serving} serves; the last reload failed: {reason}"
        return ModelNotReady(f"model {name} cannot be loaded: {reason}")

    async def unload(self, entry: Entry, reason: str = "unloaded") -> None:
        """Take a model out of its place, ensembles that need it first, and free it when its requests are done."""
        async with entry.lock:
            entry.is_needed = False
            await self._unload_ensembles_of(entry.facts.name)
            model, entry.model, entry.override = entry.model, None, None
            entry.tried_fingerprint = ""
            if model is not None:
                entry.state, entry.reason = ModelState.UNLOADING, ""
                await self._retire(model)
            entry.state, entry.reason = ModelState.UNAVAILABLE, reason

    async def unload_in_turn(self, entries: list[Entry]) -> None:
        """One after the other: an ensemble before what it is made of."""
        for entry in entries:
            await self.unload(entry)

    async def _unload_ensembles_of(self, name: str) -> None:
        reason = f"model {name}, on which it depends, was unloaded"
        # One may be loaded again while others still finish.
        while dependents := [
            other for other in self._entries.values() if other.model is not None and name in other.facts.depends_on
        ]:
            await asyncio.gather(*(self.unload(each, reason) for each in dependents))

    async def _retire(self, model: LoadedModel) -> None:
        await asyncio.gather(*(self._finish(each) for each in model.versions.values()))

    async def _finish(self, model: ServedModel) -> None:
        await model.drain(self._unload_timeout_s)
        await self.close_model(model)

    async def close_model(self, model: ServedModel) -> None:
        """Free one version, whatever it still does."""
        await model.close()
        self.live.discard(model)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """A task that `close` waits for, and that goes on when whoever asked for it leaves."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        # Read, so that asyncio does not report it: whoever waited was told, and the log has it.
        if not task.cancelled():
            task.exception()
