"""How much memory models may take: KV caches of the host's, everything of a card's; what does not fit is refused.

Floor 4. Threads of several loads may share a budget.
"""

import threading
from collections.abc import Callable

import msgspec

from sardonyx.errors import ConfigError
from sardonyx.runtime.device_memory import DeviceMemory, measure_device


class KvShare:
    """What one loaded version of a model took. Compared by identity: two versions are two shares."""

    __slots__ = ("model_name", "num_bytes")

    def __init__(self, model_name: str, num_bytes: int) -> None:
        self.model_name = model_name
        self.num_bytes = num_bytes


class KvBudget:
    """Bytes for the KV caches of all models together.

    Args:
        total_bytes: to divide.
        num_models: models that are expected to come; each may take an equal part of what is left when it comes.
    """

    def __init__(self, total_bytes: int, num_models: int = 1) -> None:
        self.total_bytes = total_bytes
        self._num_expected = num_models
        self._known_names: set[str] = set()
        self._shares: set[KvShare] = set()
        self._lock = threading.Lock()

    def take(self, model_name: str, wanted_bytes: int) -> KvShare:
        """So much, or what there is; may be 0.

        A version that replaces another may take that one's part again. Both hold it until the old one is closed: it
        runs dry meanwhile, and a reload that had to find room beside it would fail wherever one model has all.
        """
        with self._lock:
            taken = sum(share.num_bytes for share in self._shares if share.model_name != model_name)
            free = max(0, self.total_bytes - taken)
            num_coming = max(1, self._num_expected - len(self._known_names - {model_name}))
            share = KvShare(model_name, min(wanted_bytes, free // num_coming))
            self._known_names.add(model_name)
            self._shares.add(share)
            return share

    def claim(self, model_name: str, num_bytes: int) -> KvShare:
        """So much, whatever there is: the operator said so. Others find that much less."""
        with self._lock:
            share = KvShare(model_name, num_bytes)
            self._known_names.add(model_name)
            self._shares.add(share)
            return share

    def give_back(self, share: KvShare) -> None:
        """Idempotent."""
        with self._lock:
            self._shares.discard(share)


class MemoryNeed(msgspec.Struct, frozen=True, kw_only=True):
    """What a model would hold in one place, in bytes."""

    weights_bytes: int
    workspace_bytes: int = 0
    """For what lives during a step only, at its largest."""
    kv_bytes: int = 0
    """Wanted for the KV cache; it may become less."""
    least_kv_bytes: int = 0
    """Without so much of it the model could serve nobody."""

    @property
    def least_bytes(self) -> int:
        """Below this it cannot be loaded."""
        return self.weights_bytes + self.workspace_bytes + self.least_kv_bytes


class MemoryShare:
    """What one loaded version of a model was promised. Compared by identity."""

    __slots__ = ("is_loading", "kv_bytes", "model_name", "num_bytes")

    def __init__(self, model_name: str, num_bytes: int, kv_bytes: int) -> None:
        self.model_name = model_name
        self.num_bytes = num_bytes
        """In all."""
        self.kv_bytes = kv_bytes
        """Of these for the KV cache."""
        self.is_loading = True
        """It has not taken all of it yet, so that a measurement would find it free."""


class MemoryBudget:
    """Memory of one place, for all that models hold there. Nothing is ever promised that was not free when measured.

    Args:
        place: for messages (``cuda:0``).
        measure: bytes that are free now; raises ConfigError.
        limit_bytes: for all models together, however much is free; ``None``: no limit.
        num_models: with a KV cache that are expected to come; each may take an equal part of what is left then.
        remedy: what an operator may change, to end a message with.
    """

    def __init__(
        self,
        place: str,
        measure: Callable[[], int],
        *,
        limit_bytes: int | None = None,
        num_models: int = 1,
        remedy: str = "unload another model",
    ) -> None:
        self.place = place
        self._measure = measure
        self._limit_bytes = limit_bytes
        self._num_expected = num_models
        self._remedy = remedy
        self._known_names: set[str] = set()
        self._shares: set[MemoryShare] = set()
        self._lock = threading.Lock()

    def take(self, model_name: str, need: MemoryNeed) -> MemoryShare:
        """A promise of what a model needs, with as much of the KV cache that it wants as there is.

        To a version that replaces another it gives nothing of that one's: both are in memory until the old one is
        closed. Call `settle` when the model is loaded, and `give_back` when the load failed or the model is closed.

        Raises:
            ConfigError: not even the least that it needs is free.
        """
        with self._lock:
            held_bytes = sum(share.num_bytes for share in self._shares)
            loading_bytes = sum(share.num_bytes for share in self._shares if share.is_loading)
            free_bytes = self._measure()
            left_bytes = free_bytes - loading_bytes
            if self._limit_bytes is not None:
                left_bytes = min(left_bytes, self._limit_bytes - held_bytes)
            if need.least_bytes > max(0, left_bytes):
                raise ConfigError(self._refusal(need, free_bytes, held_bytes, loading_bytes))
            num_coming = max(1, self._num_expected - len(self._known_names - {model_name}))
            part_bytes = max(need.least_bytes, max(0, left_bytes) // num_coming)
            fixed_bytes = need.weights_bytes + need.workspace_bytes
            kv_bytes = min(need.kv_bytes, part_bytes - fixed_bytes)
            share = MemoryShare(model_name, fixed_bytes + kv_bytes, kv_bytes)
            self._known_names.add(model_name)
            self._shares.add(share)
            return share

    def settle(self, share: MemoryShare) -> None:
        """The model is loaded: what it took is what a measurement no longer finds free."""
        with self._lock:
            share.is_loading = False

    def give_back(self, share: MemoryShare) -> None:
        """Idempotent."""
        with self._lock:
            self._shares.discard(share)

    def _refusal(self, need: MemoryNeed, free_bytes: int, held_bytes: int, loading_bytes: int) -> str:
        parts = [
            f"{name} {_mib(num_bytes)}"
            for name, num_bytes in (
                ("weights", need.weights_bytes),
                ("workspace", need.workspace_bytes),
                ("the least KV cache", need.least_kv_bytes),
            )
            if num_bytes
        ]
        state = [f"{_mib(free_bytes)} are free"]
        if loading_bytes:
            state.append(f"{_mib(loading_bytes)} of it for models that are being loaded")
        if self._limit_bytes is not None:
            state.append(f"this server may take {_mib(self._limit_bytes)} and holds {_mib(held_bytes)}")
        return (
            f"needs {_mib(need.least_bytes)} on {self.place} ({', '.join(parts)}): {', '.join(state)}; {self._remedy}"
        )


class DeviceBudgets:
    """A budget for each card, made when the first model asks for it.

    Args:
        fraction: of a card's memory free at that moment, for all models of this server.
        num_models: as of `MemoryBudget`, on each card.
        measure: of a card by CUDA's number; raises ConfigError.
    """

    def __init__(
        self, fraction: float, num_models: int = 1, measure: Callable[[int], DeviceMemory] = measure_device
    ) -> None:
        self._fraction = fraction
        self._num_models = num_models
        self._measure = measure
        self._budgets: dict[int, MemoryBudget] = {}
        self._lock = threading.Lock()

    def on(self, device_id: int) -> MemoryBudget:
        """The budget of a card.

        Raises:
            ConfigError: it cannot be measured.
        """
        with self._lock:
            if device_id not in self._budgets:
                self._budgets[device_id] = MemoryBudget(
                    f"cuda:{device_id}",
                    lambda: self._measure(device_id).free_bytes,
                    limit_bytes=int(self._fraction * self._measure(device_id).free_bytes),
                    num_models=self._num_models,
                    remedy="unload another model, lower max_model_len, max_num_seqs or kv_cache_bytes, raise "
                    "device_memory_fraction, or export it with a smaller precision",
                )
            return self._budgets[device_id]


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
