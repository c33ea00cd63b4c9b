"""Room for a model's weights while they are loaded, on the host or on cards: a load is refused where there is none.

Floor 4. Language and speech models on cards are not looked at: they hold a share of the card for as long as they live
(`text_device`, `speech_device`). Of all others a measurement after the load shows what they took.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sardonyx.repository.autocomplete import complete_config
from sardonyx.repository.device_placement import read_device
from sardonyx.repository.layout import ModelEntry
from sardonyx.repository.manifest import Manifest
from sardonyx.repository.tensor_config import read_placement
from sardonyx.runtime.host_memory import free_memory_bytes
from sardonyx.serving.entry import CACHING_FAMILIES, TEXT_FAMILY
from sardonyx.serving.memory import DeviceBudgets, MemoryBudget, MemoryNeed

_HOST_REMEDY = "unload another model, export it with a smaller precision, or lower memory_fraction"


class LoadMemory:
    """Promises memory to loads.

    Args:
        devices: the cards' budgets.
        num_gpus: cards that can be used.
        free_bytes: of the host.
    """

    def __init__(
        self, devices: DeviceBudgets, num_gpus: int, free_bytes: Callable[[], int] = free_memory_bytes
    ) -> None:
        self._devices = devices
        self._num_gpus = num_gpus
        self._host = MemoryBudget("this machine", free_bytes, remedy=_HOST_REMEDY)

    @contextmanager
    def reserve(self, entry: ModelEntry, manifest: Manifest | None) -> Iterator[None]:
        """Hold room for the files of the versions that the block loads, once for each place.

        Raises:
            ConfigError: there is too little, or the config's device cannot be used.
        """
        is_text = manifest is not None and manifest.family == TEXT_FAMILY
        versions = entry.versions[-1:] if is_text else entry.versions
        need = MemoryNeed(weights_bytes=sum(_file_bytes(entry.version_path(version)) for version in versions))
        with ExitStack() as undo:
            for budget in self._budgets(entry, manifest):
                undo.callback(budget.give_back, budget.take(entry.name, need))
            yield

    def _budgets(self, entry: ModelEntry, manifest: Manifest | None) -> list[MemoryBudget]:
        """Of each place where the weights will be."""
        file, num_gpus = str(entry.config_path), self._num_gpus
        is_for_cards = manifest is not None and manifest.target != "cpu"
        gpus: set[int | None] = {None}
        if entry.config.platform == "ensemble" or entry.config.HasField("ensemble_scheduling"):
            gpus = set()
        elif not num_gpus or (manifest is not None and manifest.family in CACHING_FAMILIES):
            gpus = set() if is_for_cards else {None}
        elif manifest is not None:
            gpus = {read_device(entry.config, needs_gpu=is_for_cards, num_gpus=num_gpus, file=file).gpu}
        else:
            config = complete_config(entry.config, [], [], num_gpus=num_gpus, auto_complete=False)
            gpus = {each.gpu for each in read_placement(config, file=file, num_gpus=num_gpus).instances}
        return [self._host if gpu is None else self._devices.on(gpu) for gpu in gpus]


def _file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
