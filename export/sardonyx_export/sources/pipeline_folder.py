"""The weights of a diffusion pipeline's folder: which files each component has, and that they are sound."""

from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import msgspec

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.safetensors_file import SafetensorsTensor

_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class ComponentWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Of one component."""

    variant: str | None
    """``fp16`` where there is only a file of that name: ``model.fp16.safetensors``."""
    storage: dict[str, int]
    """Numbers by how they are stored."""


def read_weights(path: Path, components: Mapping[str, str]) -> dict[str, ComponentWeights]:
    """Find and check the files of every component; no weight is read.

    Args:
        path: of the pipeline.
        components: subfolders, and the stem of the files in each.

    Raises:
        ExportError: a component has no safetensors, or pickled weights only; a file is damaged or outside the folder.
    """
    folder = ModelFolder(path)
    return {part: _read_component(folder, path, part, stem) for part, stem in components.items()}


def _read_component(folder: ModelFolder, path: Path, part: str, stem: str) -> ComponentWeights:
    for variant, suffix in ((None, ""), ("fp16", ".fp16")):
        single = f"{part}/{stem}{suffix}.safetensors"
        index = f"{part}/{stem}.safetensors.index{suffix}.json"
        if folder.has(single):
            return ComponentWeights(variant=variant, storage=_storage(folder.tensors(single)))
        if folder.has(index):
            return ComponentWeights(variant=variant, storage=_read_shards(folder, part, index))
    pickled = next((each for each in sorted((path / part).glob("*")) if each.suffix in _PICKLES), None)
    if pickled is not None:
        raise ExportError(
            "holds pickled weights, which are never opened; convert them to safetensors first",
            file=f"{part}/{pickled.name}",
        )
    raise ExportError("is missing", file=f"{part}/{stem}.safetensors")


def _read_shards(folder: ModelFolder, part: str, index: str) -> dict[str, int]:
    weight_map = folder.object(index).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    if not names or any("/" in name or not name.endswith(".safetensors") for name in names):
        raise ExportError("names no safetensors files", file=index, field="weight_map")
    total: Counter[str] = Counter()
    for name in names:
        total.update(_storage(folder.tensors(f"{part}/{name}")))
    return dict(total)


def _storage(tensors: Mapping[str, SafetensorsTensor]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for tensor in tensors.values():
        found[tensor.storage] += prod(tensor.shape)
    return dict(found)
