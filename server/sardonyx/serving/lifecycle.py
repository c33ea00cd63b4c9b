"""How models come and go: loads that others wait for, reloads without a gap, unloads that finish what was accepted.

Floor 4. Part of the registry, on its event loop: sources are asked in worker threads, entries change between awaits.
Who unloads a model holds its lock while the ensembles made of it are unloaded; so a load waits for the parts of its
ensemble before it takes a lock, and no two can wait for each other. Nor does a load wait for what it brings back.
"""

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from sardonyx.errors import ConfigError, ModelNotReady, ServeError
from sardonyx.repository.index import DUPLICATE, IndexEntry
from sardonyx.serving.dependencies import find_circle, parts_of_any_kind, parts_on_disk, reach
from sardonyx.serving.entry import Entry
from sardonyx.serving.served import LoadedModel, ModelOverride, ServedModel
from sardonyx.serving.status import ModelState, safe_reason

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
"""At the end, for loads: their threads cannot be interrupted."""


class LoadFailed(ModelNotReady):
    """A load went wrong.

    Args:
        reason: safe to show.
        versions: that were to be loaded, as far as is known.
    """

    def __init__(self, name: str, reason: str, versions: list[int]) -> None:
        super().__init__(f"model {name} cannot be loaded: {reason}")
        self.reason = reason
        self.versions = versions


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

    def progress(self, name: str) -> str:
        """What a load of the model is waiting for now, where that takes minutes; empty otherwise. Returns at once."""
        ...

    def close(self) -> None:
        """Give back what the models shared. The last call."""
        ...


class Lifecycle:
    """Loads and unloads the registry's entries.

    Args:
        source: of models.
        entries: the registry's, by name.
        unload_timeout_s: how long a model that is unloaded or replaced may finish what it has.
        max_loads: at once.
    """

    def __init__(self, source: ModelSource, entries: dict[str, Entry], unload_timeout_s: float, max_loads: int) -> None:
        self.live: dict[ServedModel, tuple[str, ...]] = {}
        """Loaded and not closed, with the parts of ensembles: those in place, and those that finish what they have."""
        self.needed: set[str] = set()
        """Models that readiness waits for, until they are unloaded."""
        self.is_closed = False
        self._source = source
        self._entries = entries
        self._unload_timeout_s = unload_timeout_s
        self._load_slots = asyncio.Semaphore(max_loads)
        self._tasks: set[asyncio.Task[Any]] = set()
        """Loads, unloads and closings under way. They go on when the caller who asked for them leaves."""
        self._leaving: dict[asyncio.Task[None], tuple[str, ...]] = {}
        """Ensembles that finish what they have, with the parts that they still need."""
        self._returning: dict[asyncio.Task[LoadedModel], Entry] = {}
        """Loads of ensembles that a part brought back."""

    async def drain(self, timeout_s: float) -> None:
        """Let everything finish, so long at most. Ensembles first: they still send requests to their parts."""
        deadline_s = time.monotonic() + timeout_s
        remaining = dict(self.live)
        while remaining:
            needed = {part for parts in remaining.values() for part in parts}
            turn = [model for model in remaining if model.name not in needed] or list(remaining)
            await asyncio.gather(*(model.drain(max(0.0, deadline_s - time.monotonic())) for model in turn))
            for model in turn:
                del remaining[model]

    async def close(self) -> None:
        """End everything and free every model, but for loads that take too long. Idempotent."""
        if self.is_closed:
            return
        self.is_closed = True
        await asyncio.gather(*(self.close_model(model) for model in list(self.live)))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S)

    def check_open(self) -> None:
        """Raise ModelNotReady once `close` was called."""
        if self.is_closed:
            raise ModelNotReady("the server is shutting down")

    def fingerprint(self, entry: Entry) -> str:
        """Changes with the files of a model and of those that it is made of. Empty where they could not be read."""
        parts = sorted(reach(self._entries, entry.facts.depends_on, parts_on_disk))
        facts = [self._entries[part].facts for part in parts if part in self._entries]
        return entry.facts.fingerprint + "".join(f"/{part.name}:{part.fingerprint}" for part in facts)

    def is_current(self, entry: Entry) -> bool:
        """What serves is from the files as they are, and works."""
        model = entry.model
        if model is None or entry.loaded_fingerprint != self.fingerprint(entry):
            return False
        return all(each.is_alive for each in model.versions.values())

    async def follow(self, present: set[str]) -> None:
        """Load what is new or changed, unload what is gone.

        Args:
            present: names of the models that lie in the repositories.
        """
        work: list[asyncio.Task[Any]] = []
        for name, entry in list(self._entries.items()):
            if name not in present:
                work.append(self.spawn(self.unload(entry)))
            elif entry.facts.reason == DUPLICATE and entry.model is not None:
                work.append(self.spawn(self.unload(entry, DUPLICATE)))
            # A folder that cannot be read is being changed at this moment.
            elif entry.is_loadable and entry.facts.fingerprint and entry.tried_fingerprint != self.fingerprint(entry):
                work.append(self.begin_load(entry))
        await asyncio.gather(*work, return_exceptions=True)

    def begin_load(self, entry: Entry, override: ModelOverride | None = None) -> "asyncio.Task[LoadedModel]":
        """The load under way, or a new one. What the last one brought along is kept until the files change."""
        if entry.loading is None:
            if override is None and entry.facts.fingerprint == entry.override_fingerprint:
                override = entry.override
            entry.was_wanted, entry.is_stopped = True, False
            if entry.state is ModelState.UNAVAILABLE:
                entry.state, entry.reason = ModelState.LOADING, ""
            entry.loading = self.spawn(self._load(entry, override))
        return entry.loading

    async def _load(self, entry: Entry, override: ModelOverride | None) -> LoadedModel:
        fingerprint = self.fingerprint(entry)
        entry.tried_fingerprint = fingerprint if override is None else ""
        try:
            await self._load_parts(entry, entry.facts.depends_on if override is None else override.depends_on)
            async with entry.lock:
                self.check_open()
                if entry.model is None:
                    entry.state, entry.reason = ModelState.LOADING, ""
                async with self._load_slots:
                    model = await asyncio.to_thread(self._source.load, entry.facts.name, override)
                self.live.update(dict.fromkeys(model.versions.values(), model.depends_on))
                try:
                    self.check_open()
                    self._check_parts(entry, model)
                except ServeError:
                    await self._retire(model)
                    raise
                self._put(entry, model, override, fingerprint)
        except Exception as error:
            self.check_open()  # then it is no news
            raise self._failure(entry, error) from error
        finally:
            entry.loading, entry.awaited = None, ()
        self._bring_back(entry.facts.name)
        return model

    def _put(self, entry: Entry, model: LoadedModel, override: ModelOverride | None, fingerprint: str) -> None:
        """From here on requests get the new versions."""
        old, entry.model, entry.override = entry.model, model, override
        entry.loaded_fingerprint, entry.override_fingerprint = fingerprint, fingerprint.partition("/")[0]
        entry.past_versions.update(model.versions)
        entry.state, entry.reason = ModelState.READY, ""
        if old is not None:
            self._retire(old)

    async def _load_parts(self, entry: Entry, depends_on: tuple[str, ...]) -> None:
        """Have the models that an ensemble is made of; whether they are ready is seen when it is put together."""
        if not depends_on:
            return
        # Noted before any other load can run: of those that would wait for each other, the last one sees the circle.
        name, entry.awaited = entry.facts.name, depends_on
        if circle := find_circle(self._entries, name, depends_on):
            raise ConfigError(f"circular dependency between ensembles: {' -> '.join(circle)}")
        parts = [self._entries[part] for part in depends_on if part in self._entries]
        loads = [self.begin_load(part) for part in parts if not self.is_current(part)]
        await asyncio.gather(*loads, return_exceptions=True)

    def _check_parts(self, entry: Entry, model: LoadedModel) -> None:
        """A part may have gone since the source looked."""
        for part in model.depends_on:
            if part not in self._entries or self._entries[part].model is None:
                entry.is_stopped = True
                raise ConfigError(_part_reason(part))

    def parts(self, entry: Entry) -> list[str]:
        """Names that an ensemble depends on, directly and through other ensembles."""
        return list(reach(self._entries, parts_of_any_kind(entry), parts_of_any_kind))

    def _failure(self, entry: Entry, error: Exception) -> LoadFailed:
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
        return LoadFailed(name, reason, entry.facts.versions)

    def _bring_back(self, name: str) -> None:
        """Begin to load the ensembles again that went when this part did, if it was the last one missing.

        The part's own load does not wait for them: they may wait for it.
        """
        loaded = {other for other, each in self._entries.items() if each.model is not None}
        for other in self._entries.values():
            if other.is_stopped and name in other.facts.depends_on and loaded.issuperset(other.facts.depends_on):
                task = self.begin_load(other)
                self._returning[task] = other
                task.add_done_callback(lambda task: self._returning.pop(task, None))

    async def wait_for_ensembles(self, name: str) -> None:
        """Until those that come back with this part are there, or have failed."""
        while tasks := [task for task, other in self._returning.items() if name in self.parts(other)]:
            await asyncio.wait(tasks)

    async def unload(self, entry: Entry, reason: str = "unloaded", *, with_part: bool = False) -> None:
        """Take a model out of its place, ensembles that need it first, and free it when its requests are done.

        Args:
            entry: of the model.
            reason: for callers.
            with_part: it is an ensemble that goes only because a part does.
        """
        async with entry.lock:
            if with_part and entry.model is None:
                return
            self.needed.discard(entry.facts.name)
            await self._unload_ensembles_of(entry.facts.name)
            model, entry.model = entry.model, None
            entry.tried_fingerprint, entry.is_stopped = "", with_part
            if not with_part:
                entry.override = None
            if model is not None:
                entry.state, entry.reason = ModelState.UNLOADING, ""
                await self._retire(model)
            entry.state, entry.reason = ModelState.UNAVAILABLE, reason

    async def unload_in_turn(self, entries: list[Entry]) -> None:
        """One after the other: an ensemble before what it is made of."""
        for entry in entries:
            await self.unload(entry)

    async def _unload_ensembles_of(self, name: str) -> None:
        # One may be loaded again while others still finish.
        while True:
            dependents = [each for each in self._entries.values() if name in each.serving_parts]
            leaving = [task for task, parts in self._leaving.items() if name in parts]
            if not dependents and not leaving:
                return
            unloads = [self.unload(each, _part_reason(name), with_part=True) for each in dependents]
            await asyncio.gather(*leaving, *unloads)

    def _retire(self, model: LoadedModel) -> "asyncio.Task[None]":
        """Free a model when what it has is finished."""
        task = self.spawn(self._finish(model))
        if model.depends_on:
            self._leaving[task] = model.depends_on
            task.add_done_callback(self._leaving.pop)
        return task

    async def _finish(self, model: LoadedModel) -> None:
        async def finish(version: ServedModel) -> None:
            await version.drain(self._unload_timeout_s)
            await self.close_model(version)

        await asyncio.gather(*map(finish, model.versions.values()))

    async def close_model(self, model: ServedModel) -> None:
        """Free one version, whatever it still does."""
        await model.close()
        self.live.pop(model, None)

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


def _part_reason(part: str) -> str:
    return f"model {part}, on which it depends, was unloaded"
