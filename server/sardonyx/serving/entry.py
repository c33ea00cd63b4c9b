"""One name of the registry: what lies on disk, what serves, and what is under way.

Floor 4. Changed by `lifecycle` alone, but for `facts`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from sardonyx.errors import ModelNotFound, ModelNotReady
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.served import LoadedModel, ModelOverride, ServedModel
from sardonyx.serving.status import ModelState

TEXT_FAMILY = "llm"
TEXT_FAMILIES = frozenset({TEXT_FAMILY, ""})
"""Families of models that text can be asked of; empty is a manifest that could not be read, whose load says why."""
ENCODER_FAMILIES = frozenset({"embeddings", "reranker", "classifier"})
"""Families of models that read a text once."""
IMAGE_CLASSIFIER = "image_classifier"
SPEECH_FAMILY = "whisper"
DIFFUSION_FAMILY = "diffusion"
CACHING_FAMILIES = frozenset({TEXT_FAMILY, SPEECH_FAMILY})
"""Families of models with a KV cache."""
OPENAI_FAMILIES = TEXT_FAMILIES | ENCODER_FAMILIES | {IMAGE_CLASSIFIER, SPEECH_FAMILY, DIFFUSION_FAMILY}
"""What the OpenAI endpoints can use."""
FAMILIES = OPENAI_FAMILIES | {"tensors"}
"""What can be loaded."""


@dataclass(slots=True, eq=False)
class Entry:
    """All but `lock` changes between awaits only."""

    facts: IndexEntry
    state: ModelState = ModelState.UNAVAILABLE
    reason: str = "not loaded"
    model: LoadedModel | None = None
    """What requests get; set exactly while READY."""
    loaded_fingerprint: str = ""
    """Of what `model` was loaded from; see `Lifecycle.fingerprint`."""
    override: ModelOverride | None = None
    """What the load of `model` brought along."""
    override_fingerprint: str = ""
    """Of the files in whose place it came."""
    was_wanted: bool = False
    """A load was begun at some time."""
    tried_fingerprint: str = ""
    """Of what the last load was from; empty where it brought something along."""
    past_versions: set[int] = field(default_factory=set)
    """Served at some time."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever loads or unloads."""
    loading: "asyncio.Task[LoadedModel] | None" = None
    """The load that others who ask for one may wait for as well."""
    awaited: tuple[str, ...] = ()
    """Parts of the ensemble that is being loaded."""
    progress: Callable[[], str] = str
    """What a load under way waits for, where that takes minutes; see `ModelSource.progress`."""
    is_stopped: bool = False
    """An ensemble that went only because a part did; the part will bring it back."""

    def served(self, name: str, version: int | None) -> ServedModel:
        """A version that serves, the highest where none is named. The words are Triton's.

        Args:
            name: as the caller calls the model.

        Raises:
            ModelNotFound: there never was such a version.
            ModelNotReady: it cannot be used now.
        """
        asked = f"Request for unknown model: '{name[:160]}'"
        if self.model is None:
            if version is not None and version not in {*self.past_versions, *self.facts.versions}:
                raise ModelNotFound(f"{asked} version {version} is not found")
            reason = f": {self.why}" if self.why else ""
            raise ModelNotReady(f"{asked} has no available versions{reason}")
        if version is None:
            return self.model.newest
        if version not in self.model.versions:
            if version in self.past_versions:
                raise ModelNotReady(f"{asked} version {version} is not at ready state")
            raise ModelNotFound(f"{asked} version {version} is not found")
        return self.model.versions[version]

    @property
    def why(self) -> str:
        """The reason for its state, or what a load of it waits for; safe to show. May be empty."""
        return self.reason or self.progress()

    @property
    def is_loadable(self) -> bool:
        """It is of a family that can be loaded."""
        return self.facts.family in FAMILIES

    @property
    def known_versions(self) -> set[int]:
        """For the index. What lies on disk and was not loaded yet is no version beside those that serve."""
        return {*self.past_versions, *(self.facts.versions if self.model is None else ())}

    @property
    def serving_parts(self) -> tuple[str, ...]:
        """What the ensemble that serves is made of."""
        return self.model.depends_on if self.model is not None else ()
