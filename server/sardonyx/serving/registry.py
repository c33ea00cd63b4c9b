"""The models of this process by name: which there are, which can be used, and their coming and going.

Floor 4. Used from one event loop; loading and closing run in worker threads. A model is an object that is put in place
or taken out of it between two awaits, so whoever resolved a name holds a model that works until its calls have ended.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Set
from functools import partial

from sardonyx.errors import ConfigError, InvalidRequest, ModelNotFound, ModelNotReady
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.entry import FAMILIES, OPENAI_FAMILIES, TEXT_FAMILIES, Entry
from sardonyx.serving.lifecycle import Lifecycle, ModelSource
from sardonyx.serving.override import check_override
from sardonyx.serving.readiness import failures, missing, stuck
from sardonyx.serving.served import LoadedModel, ModelOverride, ServedModel
from sardonyx.serving.status import ModelState, ModelStatus, VersionStatus, describe, describe_versions
from sardonyx.serving.text import TextModel

__all__ = ["OPENAI_FAMILIES", "TEXT_FAMILIES", "ModelSource", "ModelState", "ModelStatus", "Registry", "VersionStatus"]

logger = logging.getLogger(__name__)


class Registry:
    """All models by name, with aliases and a default.

    Args:
        source: of models.
        default_model: for requests that name none; ``None``: the first by name, ready ones before others.
        aliases: other names, each for a model.
        unload_timeout_s: how long a model that is unloaded or replaced may finish what it has.
        is_strict: readiness asks for every model of the start.
        max_loads: at once.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        default_model: str | None = None,
        aliases: Mapping[str, str] | None = None,
        unload_timeout_s: float = 30.0,
        is_strict: bool = True,
        max_loads: int = 2,
    ) -> None:
        self._source = source
        self._default_model = default_model
        self._aliases = dict(aliases or {})
        self._is_strict = is_strict
        self._entries: dict[str, Entry] = {}
        self._lifecycle = Lifecycle(source, self._entries, unload_timeout_s, max_loads)
        self._refreshing = asyncio.Lock()
        self._has_started = False
        self._is_draining = False
        self._is_accepting = True

    async def start(self, names: Iterable[str] | None = None) -> None:
        """Read the repositories and load models. Readiness waits for all of them.

        Returns when each is loaded or has failed; a task of its own lets requests in meanwhile.

        Args:
            names: what to load; ``None``: everything. An ensemble brings its parts along.

        Raises:
            ConfigError: there is no repository.
        """
        await self.refresh()
        wanted = set(self._entries if names is None else names)
        if names is None:
            wanted = {name for name in wanted if self._entries[name].is_loadable}
        self._lifecycle.needed.update(wanted)
        self._has_started = True
        for name in sorted(wanted - self._entries.keys()):
            logger.error("there is no model %s in the repository", name)
        for alias, name in self._aliases.items():
            if name not in self._entries:
                logger.warning("alias %s stands for %s, which is not in the repository", alias, name)
        present = [self._entries[name] for name in sorted(wanted) if name in self._entries]
        await asyncio.gather(*map(self._lifecycle.begin_load, present), return_exceptions=True)

    async def refresh(self) -> set[str]:
        """Look at the repositories again, for what was added or removed. `load` does so too.

        Returns:
            Names of the models that lie there.

        Raises:
            ConfigError: there is no repository.
        """
        async with self._refreshing:  # so that a slow look cannot undo a later one
            facts = {each.name: each for each in await asyncio.to_thread(self._source.index)}
        for name, each in facts.items():
            if name in self._entries:
                self._entries[name].facts = each
            else:
                self._entries[name] = self._new_entry(each)
        for name in self._entries.keys() - facts.keys():
            entry = self._entries[name]
            if entry.model is None and entry.loading is None and not entry.lock.locked():
                del self._entries[name]
        return set(facts)

    async def poll(self) -> None:
        """Follow the repositories: load what is new or changed, unload what is gone.

        What cannot be loaded is tried again when its files change once more; what served before goes on serving.
        """
        await self._lifecycle.follow(await self.refresh())

    def resolve(self, name: str | None) -> TextModel:
        """The language model for a request; the default model where it names none. Raises as `newest`."""
        model = self.newest(name or self._default_model, TEXT_FAMILIES, "language model")
        if not isinstance(model.task, TextModel):
            raise _other_kind(model.name, "language model")
        return model.task

    def newest(self, name: str | None, families: Set[str], kind: str) -> ServedModel:
        """The model for a request to an endpoint that some families serve.

        Args:
            name: a model or an alias; ``None`` or empty for the first by name, ready ones before others.
            families: that serve the endpoint.
            kind: what messages call such a model.

        Raises:
            ModelNotFound: unknown name, with code ``model_not_found``, or there is no such model.
            ModelNotReady: loading, unloading or failed, or the server is shutting down.
            InvalidRequest: the model is of another kind.
        """
        self._check_accepting()
        wanted = name or self._first(families, kind)
        entry = self._find(wanted)
        if entry is None:
            raise _not_found(wanted)
        if entry.model is None:
            reason = f": {entry.why}" if entry.why else ""
            raise ModelNotReady(f"model {entry.facts.name} is {entry.state.lower()}{reason}")
        if entry.facts.family not in families:
            raise _other_kind(entry.facts.name, kind)
        return entry.model.newest

    def of_families(self, families: Set[str]) -> "list[ModelStatus]":
        """The models of some families, by name."""
        return [status for status in self.list() if status.family in families]

    def served(self, name: str, version: int | None = None) -> ServedModel:
        """A version of a model of any family, the highest where none is named. The words are Triton's.

        Raises:
            ModelNotFound: no such model, or no such version.
            ModelNotReady: it is there but cannot be used now, or the server is shutting down.
        """
        self._check_accepting()
        entry = self._find(name)
        if entry is None:
            raise ModelNotFound(f"Request for unknown model: '{name[:160]}' is not found")
        return entry.served(name, version)

    def progress(self, name: str) -> str:
        """What a load of the model is waiting for now, where that takes minutes; empty otherwise."""
        entry = self._find(name)
        return "" if entry is None else entry.progress()

    def part(self, name: str, version: int | None = None) -> ServedModel:
        """As `served`, for ensembles: they finish what they have also while the server shuts down. No aliases."""
        if name not in self._entries:
            raise ModelNotFound(f"Request for unknown model: '{name[:160]}' is not found")
        return self._entries[name].served(name, version)

    def ready_models(self) -> list[LoadedModel]:
        """All that can be used now, by name."""
        return [entry.model for _, entry in sorted(self._entries.items()) if entry.model is not None]

    def versions(self, name: str) -> list[int]:
        """Ready versions of a model, ascending. Raises as `served`."""
        entry = self._find(self.served(name).name)
        return sorted(entry.model.versions) if entry is not None and entry.model is not None else []

    async def load(
        self, name: str, override: ModelOverride | None = None, *, only_if_changed: bool = False
    ) -> LoadedModel:
        """Load a model, or reload it: the old versions serve until the new ones are ready, and finish what they have.

        Who asks while it is being loaded gets that load's result, unless either brings something along.

        Args:
            name: of a model.
            override: in place of what lies in the repository, until the files there change.
            only_if_changed: leave a model alone that serves from the files as they are.

        Raises:
            InvalidRequest: `override` cannot be used; nothing was changed.
            ModelNotFound: no such model in the repository.
            ModelNotReady: it cannot be loaded (`lifecycle.LoadFailed` says why). Old versions go on serving.
        """
        name = self._aliases.get(name, name)
        if override is not None:
            override = await asyncio.to_thread(check_override, name, override)
        while True:
            self._lifecycle.check_open()
            try:
                await self.refresh()
            except ConfigError as error:
                logger.error("the repositories could not be read: %s", error)
                raise ModelNotReady("the model repositories cannot be read") from error
            self._lifecycle.check_open()
            if override is not None and override.files and name not in self._entries:
                self._entries[name] = self._new_entry(IndexEntry(name=name, versions=[], family="tensors"))
            entry = self._entry(name)
            if override is None and only_if_changed and self._lifecycle.is_current(entry):
                assert entry.model is not None
                return entry.model
            if entry.loading is None or (override is None and not self._is_out_of_date(entry)):
                break
            await asyncio.wait([entry.loading])
        model: LoadedModel = await asyncio.shield(self._lifecycle.begin_load(entry, override))
        await self._lifecycle.wait_for_ensembles(name)
        return model

    def _is_out_of_date(self, entry: Entry) -> bool:
        """The load under way is of other files than those that lie there now."""
        return entry.tried_fingerprint != self._lifecycle.fingerprint(entry)

    async def unload(self, name: str, *, unload_dependents: bool = False) -> None:
        """Take no more requests for the model, finish those it has up to the drain limit, and free it.

        Ensembles that it is a part of become unavailable, too.

        Args:
            name: of a model.
            unload_dependents: also unload the models that an ensemble is made of.

        Raises:
            ModelNotFound: no such model.
        """
        self._lifecycle.check_open()
        entry = self._entry(self._aliases.get(name, name))
        entries = [entry]
        if unload_dependents:
            entries += [self._entries[part] for part in self._lifecycle.parts(entry) if part in self._entries]
        await asyncio.shield(self._lifecycle.spawn(self._lifecycle.unload_in_turn(entries)))

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one generation by its id, or all of them; each ends as CANCELLED with what it has.

        Returns:
            How many were ended.
        """
        return sum(model.stop_generation(request_id) for model in self._lifecycle.live)

    def unready_reasons(self) -> "list[str]":
        """Why `is_ready` says no; safe to show."""
        reasons = []
        if not self._has_started:
            reasons.append("the server is starting")
        if self._is_draining:
            reasons.append("the server is shutting down")
        if self._is_strict:
            reasons += missing(self._entries, self._lifecycle.needed)
        return reasons + self.stuck_reasons()

    def stuck_reasons(self) -> "list[str]":
        """Engines that stopped or make no progress; safe to show."""
        return stuck(self._entries)

    def is_ready(self) -> bool:
        """Accepting, every startup model READY (where that is asked for), and every engine alive and moving."""
        return not self.unready_reasons()

    def has_settled(self) -> bool:
        """Each model of the start was loaded or has failed."""
        needed = (self._entries[name] for name in self._lifecycle.needed if name in self._entries)
        return self._has_started and not any(entry.state is ModelState.LOADING for entry in needed)

    @property
    def is_live(self) -> bool:
        """The repositories were read, and the server is not shutting down."""
        return self._has_started and self._is_accepting

    def startup_failures(self) -> dict[str, str]:
        """Models of the start that could not be loaded, with the reason. After `start`."""
        return failures(self._entries, self._lifecycle.needed)

    async def drain(self, grace_s: float, timeout_s: float) -> None:
        """Shut down in order.

        Readiness turns false at once; new requests are refused after `grace_s`, for balancers to notice; those under
        way have `timeout_s` from then; what is left is ended with an error. Then `close`.
        """
        self._is_draining = True
        await asyncio.sleep(grace_s)
        self._is_accepting = False
        await self._lifecycle.drain(timeout_s)
        await self.close()

    async def close(self) -> None:
        """End everything and free every model. Idempotent."""
        self._is_draining, self._is_accepting = True, False
        await self._lifecycle.close()
        for entry in self._entries.values():
            entry.model, entry.state, entry.reason = None, ModelState.UNAVAILABLE, "the server is shutting down"
        self._source.close()

    def _first(self, families: Set[str], kind: str) -> str:
        names = [name for name, entry in self._entries.items() if entry.facts.family in families]
        if not names:
            article = "an" if kind[0] in "aeiou" else "a"
            raise ModelNotFound(
                f"there is no {kind} in the repository; export {article} {kind}, or name another model",
                param="model",
                code="model_not_found",
            )
        return min(names, key=lambda name: (self._entries[name].model is None, name))

    def _find(self, name: str) -> Entry | None:
        """By alias first: an alias may hide a model's name."""
        return self._entries.get(self._aliases.get(name, name)) or self._entries.get(name)

    def _new_entry(self, facts: IndexEntry) -> Entry:
        progress = partial(self._source.progress, facts.name)
        return Entry(facts, reason=_other_family(facts.family) or "not loaded", progress=progress)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise _not_found(name)
        return self._entries[name]

    def _check_accepting(self) -> None:
        if not self._is_accepting:
            raise ModelNotReady("the server is shutting down")

    def version_index(self) -> list[VersionStatus]:
        """Every version of every model, as Triton's repository index shows them."""
        rows = []
        for _, entry in sorted(self._entries.items()):
            is_new = not entry.was_wanted and entry.is_loadable
            versions, state = (set(), None) if is_new else (entry.known_versions, entry.state)
            rows += describe_versions(entry.facts.name, versions, entry.model, state, entry.why)
        return rows

    def list(self) -> "list[ModelStatus]":
        """Every model of the repository, by name. Instant, also while models load."""
        return [
            describe(entry.facts, entry.model, entry.state, entry.why) for _, entry in sorted(self._entries.items())
        ]


def _not_found(name: str) -> ModelNotFound:
    return ModelNotFound(
        f"The model `{name[:160]}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


def _other_kind(name: str, kind: str) -> InvalidRequest:
    article = "an" if kind[0] in "aeiou" else "a"
    return InvalidRequest(
        f"model {name} is not {article} {kind}; its tensors are served at /v2/models/{name}", param="model"
    )


def _other_family(family: str) -> str:
    """Why a model of that family is not served; empty for those that are, or whose manifest could not be read."""
    return "" if family in FAMILIES else f"models of the family {family} are not served"
