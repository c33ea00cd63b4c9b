"""Execution providers by our names, with the options that we open them with.

Floor 2. A name here is what settings and `instance_group` kinds resolve to; ONNX Runtime's names stay in this package.
"""

from dataclasses import dataclass, field

import onnxruntime as ort

from sardonyx.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ExecutionProvider:
    """One entry of the providers that a session is opened with."""

    name: str
    """Ours: ``cpu``."""
    ort_name: str
    options: dict[str, str] = field(default_factory=dict)


_PROVIDERS = {
    provider.name: provider
    for provider in (
        ExecutionProvider("cpu", "CPUExecutionProvider"),
        # The arena's default doubles its last block, which wastes up to half of a card that other models share.
        ExecutionProvider("cuda", "CUDAExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),
    )
}


def execution_provider(name: str) -> ExecutionProvider:
    """Look a provider up.

    Raises:
        ConfigError: we do not know it, or the installed ONNX Runtime was built without it.
    """
    provider = _PROVIDERS.get(name)
    if provider is None:
        raise ConfigError(f"{name!r} is not known; known are {', '.join(_PROVIDERS)}", field="execution provider")
    if provider.ort_name not in ort.get_available_providers():
        raise ConfigError(
            f"{name!r} is not part of the installed ONNX Runtime; install sardonyx[{name}]", field="execution provider"
        )
    return provider
