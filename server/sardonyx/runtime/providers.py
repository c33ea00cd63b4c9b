"""Execution providers by our names, with the options that we open them with.

Floor 2. A name here is what settings and `instance_group` kinds resolve to; ONNX Runtime's names stay in this package.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnxruntime as ort

from sardonyx.errors import ConfigError

ORT_VERSION: str = ort.__version__


@dataclass(frozen=True, slots=True)
class ExecutionProvider:
    """One entry of the providers that a session is opened with."""

    name: str
    """Ours: ``cpu``."""
    ort_name: str
    options: dict[str, str] = field(default_factory=dict)
    package: str = "sardonyx[cuda]"
    """What brings it along."""


_PROVIDERS = {
    provider.name: provider
    for provider in (
        ExecutionProvider("cpu", "CPUExecutionProvider"),
        # The arena's default doubles its last block, which wastes up to half of a card that other models share.
        ExecutionProvider("cuda", "CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
        ExecutionProvider("tensorrt", "TensorrtExecutionProvider"),
        ExecutionProvider("openvino", "OpenVINOExecutionProvider", package="onnxruntime-openvino"),
    )
}


def num_gpus(root: Path = Path("/")) -> int:
    """CUDA devices that the installed ONNX Runtime could use; 0 where it was built without CUDA.

    ONNX Runtime does not tell, and asking CUDA itself would need another library; the driver's files do.

    Args:
        root: where ``proc`` and ``dev`` lie.
    """
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return 0
    cards = root / "proc/driver/nvidia/gpus"
    num_cards = len(list(cards.iterdir())) if cards.is_dir() else int((root / "dev/nvhost-gpu").exists())  # Jetson
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return num_cards if visible is None else min(num_cards, len([each for each in visible.split(",") if each.strip()]))


def execution_provider(name: str, options: Mapping[str, str] | None = None) -> ExecutionProvider:
    """Look a provider up.

    Args:
        name: ours.
        options: ONNX Runtime's, added to those that we open it with.

    Raises:
        ConfigError: we do not know it, or the installed ONNX Runtime was built without it.
    """
    provider = _PROVIDERS.get(name)
    if provider is None:
        raise ConfigError(f"{name!r} is not known; known are {', '.join(_PROVIDERS)}", field="execution provider")
    if provider.ort_name not in ort.get_available_providers():
        raise ConfigError(
            f"{name!r} is not part of the installed ONNX Runtime; install {provider.package}",
            field="execution provider",
        )
    return replace(provider, options=provider.options | dict(options)) if options else provider
