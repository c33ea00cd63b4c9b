"""The models of this process by name: which there are, which can be used, and their coming and going.

Floor 4. Used from one event loop; loading and closing run in worker threads.
"""

import enum

import msgspec

from sardonyx.serving.text import TextModel


class ModelState(enum.StrEnum):
    """Triton's words for where a model stands."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the repository."""

    name: str
    version: int | None
    """The version that serves, or the newest one there is; ``None`` without any."""
    family: str
    """From the manifest; empty where it could not be read."""
    state: ModelState
    reason: str
    """Why it is UNAVAILABLE, or why the last reload failed; safe to show. Empty otherwise."""
    size_bytes: int
    created: int
    """Unix time of the export, 0 where unknown."""
    max_model_len: int | None


class Registry:
    """All models by name, with aliases and a default."""

    def resolve(self, name: str | None) -> TextModel:
        """The model for a request.

        Args:
            name: a model or an alias; ``None`` or empty for the default model.

        Raises:
            ModelNotFound: unknown name, with code ``model_not_found``.
            ModelNotReady: loading, unloading or failed, or the server is shutting down.
        """
        raise NotImplementedError

    def list(self) -> list[ModelStatus]:
        """Every model of the repository, by name. Instant, also while models load."""
        raise NotImplementedError

    async def load(self, name: str) -> TextModel:
        """Load a model, or reload it: the old version serves until the new one is ready, and finishes what it has.

        Raises:
            ModelNotFound: no such model in the repository.
            ModelNotReady: it cannot be loaded; the message says why. An old version goes on serving.
        """
        raise NotImplementedError

    async def unload(self, name: str) -> None:
        """Take no more requests for the model, finish those it has up to the drain limit, and free it.

        Raises:
            ModelNotFound: no such model.
        """
        raise NotImplementedError

    def stop_generation(self, request_id: str | None = None) -> int:
        """End one generation by its id, or all of them; each ends as CANCELLED with what it has.

        Returns:
            How many were ended.
        """
        raise NotImplementedError

    def is_ready(self) -> bool:
        """Accepting, every startup model READY, and every engine alive and moving."""
        raise NotImplementedError

    async def drain(self, grace_s: float, timeout_s: float) -> None:
        """Shut down in order: readiness turns false at once, new requests are refused after `grace_s`, those under
        way have `timeout_s` from then; what is left is ended with an error. Then `close`.
        """
        raise NotImplementedError

    async def close(self) -> None:
        """End everything and free every model. Idempotent."""
        raise NotImplementedError
