"""The models of this process by name: which there are, which can be used, and their coming and going.

Floor 4. Used from one event loop; loading and closing run in worker threads. A model is an object that is put in place
or taken out of it between two awaits, so whoever resolved a name holds a model that works until its calls have ended.
"""

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sardonyx.errors import ModelNotFound, ModelNotReady, ServeError
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.status import ModelState, ModelStatus, describe, safe_reason
from sardonyx.serving.text import TextModel

__all__ = ["ModelSource", "ModelState", "ModelStatus", "Registry"]

logger = logging.getLogger(__name__)

FAMILY = "llm"
"""What this registry loads."""
STALLED_S = 30.0
"""With work and no finished step for so long, an engine is taken for stuck."""
_MAX_LOADS = 2
"""At once. Loading is reading from disk and building tables; more of it at a time only slows what is served."""


class ModelSource(Protocol):
    """Where a registry gets its models. `serving.loader.TextLoader` is one.

    `index` and `load` block, and run in worker threads.
    """

    def index(self) -> list[IndexEntry]:
        """Every model of the repository, by name. Raises ConfigError without a repository."""
        ...

    def load(self, name: str) -> TextModel:
        """The newest version of a model, ready for requests.

        Raises:
            ServeError: it cannot be loaded; ConfigError names file and field.
        """
        ...

    def close(self) -> None:
        """Give back what the models shared. The last call."""
        ...


@dataclass(slots=True, eq=False)
class _Entry:
    """One name. All but `lock` changes between awaits only."""

    facts: IndexEntry
    state: ModelState = ModelState.UNAVAILABLE
    reason: str = "not loaded"
    model: TextModel | None = None
    """What requests get; set exactly while READY."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever loads or unloads."""
    loading: "asyncio.Task[TextModel] | None" = None
    """The load that others who ask for one may wait for as well."""


class Registry:
    """All models by name, with aliases and a default.

    Args:
        source: of models.
        default_model: for requests that name none; ``None``: the first by name, ready ones before others.
        aliases: other names, each for a model.
        unload_timeout_s: how long a model that is unloaded or replaced may finish what it has.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        default_model: str | None = None,
        aliases: Mapping[str, str] | None = None,
        unload_timeout_s: float = 30.0,
    ) -> None:
        self._source = source
        self._default_model = default_model
        self._aliases = dict(aliases or {})
        self._unload_timeout_s = unload_timeout_s
        self._entries: dict[str, _Entry] = {}
        self._startup_names: set[str] = set()
        self._live: set[TextModel] = set()
        """Loaded and not closed: those in place, and those that finish what they have."""
        self._refreshing = asyncio.Lock()
        self._load_slots = asyncio.Semaphore(_MAX_LOADS)
        self._tasks: set[asyncio.Task[Any]] = set()
        """Loads, unloads and closings under way. They go on when the caller who asked for them leaves."""
        self._has_started = False
        self._is_draining = False
        self._is_accepting = True
        self._is_closed = False

    async def start(self) -> None:
        """Read the repository and load every language model in it. Readiness waits for all of them.

        Returns when each is loaded or has failed; a task of its own lets requests in meanwhile.

        Raises:
            ConfigError: there is no repository.
        """
        await self.refresh()
        self._startup_names = {name for name, entry in self._entries.items() if entry.facts.family in {FAMILY, ""}}
        self._has_started = True
        for alias, name in self._aliases.items():
            if name not in self._entries:
                logger.warning("alias %s stands for %s, which is not in the repository", alias, name)
        await asyncio.gather(
            *(self._begin_load(self._entries[name]) for name in sorted(self._startup_names)), return_exceptions=True
        )

    async def refresh(self) -> None:
        """Look at the repository again, for what was added or removed. `load` does so too.

        Raises:
            ConfigError: there is no repository.
        """
        async with self._refreshing:  # so that a slow look cannot undo a later one
            facts = {each.name: each for each in await asyncio.to_thread(self._source.index)}
        for name, each in facts.items():
            if name in self._entries:
                self._entries[name].facts = each
            else:
                self._entries[name] = _Entry(each, reason=each.reason or _other_family(each.family) or "not loaded")
        for name in self._entries.keys() - facts.keys():
            entry = self._entries[name]
            if entry.model is None and entry.loading is None and not entry.lock.locked():
                del self._entries[name]
                self._startup_names.discard(name)

    def resolve(self, name: str | None) -> TextModel:
        """The model for a request.

        Args:
            name: a model or an alias; ``None`` or empty for the default model.

        Raises:
            ModelNotFound: unknown name, with code ``model_not_found``.
            ModelNotReady: loading, unloading or failed, or the server is shutting down.
        """
        if not self._is_accepting:
            raise ModelNotReady("the server is shutting down")
        wanted = name or self._default_name()
        entry = self._entries.get(self._aliases.get(wanted, wanted)) or self._entries.get(wanted)
        if entry is None:
            raise _not_found(wanted)
        if entry.model is None:
            reason = f": {entry.reason}" if entry.reason else ""
            raise ModelNotReady(f"model {entry.facts.name} is {entry.state.lower()}{reason}")
        return entry.model

    async def load(self, name: str) -> TextModel:
        """Load a model, or reload it: the old version serves until the new one is ready, and finishes what it has.

        Who asks while it is being loaded gets that load's result.

        Raises:
            ModelNotFound: no such model in the repository.
            ModelNotReady: it cannot be loaded; the message says why. An old version goes on serving.
        """
        self._check_open()
        name = self._aliases.get(name, name)
        if name not in self._entries or self._entries[name].loading is None:
            await self.refresh()
            self._check_open()
        model: TextModel = await asyncio.shield(self._begin_load(self._entry(name)))
        return model

    async def unload(self, name: str) -> None:
        """Take no more requests for the model, finish those it has up to the drain limit, and free it.

        Raises:
            ModelNotFound: no such model.
        """
        self._check_open()
        await asyncio.shield(self._spawn(self._unload(self._entry(self._aliases.get(name, name)))))

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one generation by its id, or all of them; each ends as CANCELLED with what it has.

        Returns:
            How many were ended.
        """
        return sum(model.stop_generation(request_id) for model in self._live)

    def unready_reasons(self) -> "list[str]":
        """Why `is_ready` says no; safe to show."""
        reasons = []
        if not self._has_started:
            reasons.append("the server is starting")
        if self._is_draining:
            reasons.append("the server is shutting down")
        for name in sorted(self._startup_names):
            entry = self._entries[name]
            if entry.state is not ModelState.READY:
                reasons.append(f"model {name} is {entry.state.lower()}")
        for name, entry in self._entries.items():
            if entry.model is not None and not entry.model.is_alive:
                reasons.append(f"the engine of model {name} stopped")
            elif entry.model is not None and entry.model.stats().stalled_s > STALLED_S:
                reasons.append(f"the engine of model {name} makes no progress")
        return reasons

    def is_ready(self) -> bool:
        """Accepting, every startup model READY, and every engine alive and moving."""
        return not self.unready_reasons()

    async def drain(self, grace_s: float, timeout_s: float) -> None:
        """Shut down in order.

        Readiness turns false at once; new requests are refused after `grace_s`, for balancers to notice; those under
        way have `timeout_s` from then; what is left is ended with an error. Then `close`.
        """
        self._is_draining = True
        await asyncio.sleep(grace_s)
        self._is_accepting = False
        await asyncio.gather(*(model.drain(timeout_s) for model in self._live))
        await self.close()

    async def close(self) -> None:
        """End everything and free every model. Idempotent."""
        self._is_draining, self._is_accepting, self._is_closed = True, False, True
        await asyncio.gather(*(self._close(model) for model in list(self._live)))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for entry in self._entries.values():
            entry.model, entry.state, entry.reason = None, ModelState.UNAVAILABLE, "the server is shutting down"
        self._source.close()

    def _begin_load(self, entry: _Entry) -> "asyncio.Task[TextModel]":
        """The load under way, or a new one."""
        if entry.loading is None:
            if entry.state is ModelState.UNAVAILABLE:
                entry.state, entry.reason = ModelState.LOADING, ""
            entry.loading = self._spawn(self._load(entry))
        return entry.loading

    async def _load(self, entry: _Entry) -> TextModel:
        try:
            async with entry.lock, self._load_slots:
                self._check_open()
                if entry.model is None:
                    entry.state, entry.reason = ModelState.LOADING, ""
                try:
                    model = await asyncio.to_thread(self._source.load, entry.facts.name)
                except Exception as error:
                    raise self._failure(entry, error) from error
                self._live.add(model)
                if self._is_closed:
                    await self._close(model)
                    self._check_open()
                old, entry.model = entry.model, model
                entry.state, entry.reason = ModelState.READY, ""
                if old is not None:
                    self._spawn(self._retire(old))
                return model
        finally:
            entry.loading = None

    def _failure(self, entry: _Entry, error: Exception) -> ModelNotReady:
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
            entry.reason = f"version {entry.model.version} serves; the last reload failed: {reason}"
        return ModelNotReady(f"model {name} cannot be loaded: {reason}")

    async def _unload(self, entry: _Entry) -> None:
        async with entry.lock:
            self._startup_names.discard(entry.facts.name)
            model, entry.model = entry.model, None
            if model is not None:
                entry.state, entry.reason = ModelState.UNLOADING, ""
                await self._retire(model)
            entry.state, entry.reason = ModelState.UNAVAILABLE, "unloaded"

    async def _retire(self, model: TextModel) -> None:
        await model.drain(self._unload_timeout_s)
        await self._close(model)

    async def _close(self, model: TextModel) -> None:
        await model.close()
        self._live.discard(model)

    def _default_name(self) -> str:
        if self._default_model is not None:
            return self._default_model
        names = sorted(self._entries, key=lambda name: (self._entries[name].model is None, name))
        names = [name for name in names if not _other_family(self._entries[name].facts.family)]
        if not names:
            raise ModelNotFound("there is no language model in the repository", code="model_not_found")
        return names[0]

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise _not_found(name)
        return self._entries[name]

    def _check_open(self) -> None:
        if self._is_closed:
            raise ModelNotReady("the server is shutting down")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        # Read, so that asyncio does not report it: whoever waited was told, and the log has it.
        if not task.cancelled():
            task.exception()

    def list(self) -> "list[ModelStatus]":
        """Every model of the repository, by name. Instant, also while models load."""
        return [
            describe(entry.facts, entry.model, entry.state, entry.reason) for _, entry in sorted(self._entries.items())
        ]


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model `{name[:160]}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def _other_family(family: str) -> str:
    """Why a model of that family is not served; empty for those that are, or whose manifest could not be read."""
    return "" if family in {FAMILY, ""} else f"no language model: its family is {family}"
