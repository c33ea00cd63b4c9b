"""On which device a model with a manifest runs, and with which execution providers: two fields of its config.

Floor 1. For language and speech models that were exported for cards, and for families whose graphs may run there as
they are: encoders, image classifiers, diffusion models. They have one place; how many steps run at once there is their
own parameter.
"""

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from sardonyx.errors import ConfigError
from sardonyx.repository.accelerators import GPU_PROVIDERS, ProviderChoice, read_providers
from sardonyx.repository.config import FILE_NAME
from sardonyx.repository.config_fields import refuse_fields
from sardonyx.repository.session_parameters import SessionParameters

_FIELDS = ("instance_group", "optimization")
_HONOURED_OPTIMIZATION = frozenset({"execution_accelerators"})


class DevicePlacement(msgspec.Struct, frozen=True, kw_only=True):
    """One place for all graphs of a model."""

    gpu: int | None = None
    """Number of the card; ``None``: the CPU."""
    providers: list[ProviderChoice] = []
    """In the order in which they are asked for nodes; empty on the CPU without accelerators."""
    is_strict: bool = False
    """The operator or the export asked for a card: nothing but shapes may be computed on the CPU."""


def read_device(config: ModelConfig, *, needs_gpu: bool, num_gpus: int, file: str = FILE_NAME) -> DevicePlacement:
    """Check and read the fields.

    Args:
        config: the operator's.
        needs_gpu: the graphs were exported for a card.
        num_gpus: cards that there are.
        file: for messages.

    Raises:
        ConfigError: a card that is needed is not there; more than one place; an accelerator or option that is unknown.
    """
    own = ModelConfig()
    for group in config.instance_group:
        own.instance_group.add().CopyFrom(group)
    own.optimization.CopyFrom(config.optimization)
    refuse_fields(own, file=file)
    for field, _ in own.optimization.ListFields():
        if field.name not in _HONOURED_OPTIMIZATION:
            raise ConfigError(
                "has no meaning for a model with a manifest", file=file, field=f"optimization.{field.name}"
            )
    gpu, is_asked = _gpu(config, needs_gpu, num_gpus, file)
    providers, _ = read_providers(own, SessionParameters(), file=file)
    if gpu is None:
        providers = [each for each in providers if each.name not in GPU_PROVIDERS]
    return DevicePlacement(
        gpu=gpu,
        providers=providers if len(providers) > 1 else [],
        is_strict=gpu is not None and (needs_gpu or is_asked),
    )


def without_device(config: ModelConfig) -> ModelConfig:
    """A copy that says nothing of the device, for those who read the rest."""
    rest = ModelConfig()
    rest.CopyFrom(config)
    for field in _FIELDS:
        rest.ClearField(field)
    return rest


def _gpu(config: ModelConfig, needs_gpu: bool, num_gpus: int, file: str) -> tuple[int | None, bool]:
    """Number of the card, and whether the config insists on one."""
    if len(config.instance_group) > 1:
        raise ConfigError("has more than one group; such a model has one place", file=file, field="instance_group")
    group = config.instance_group[0] if config.instance_group else ModelInstanceGroup()
    where = "instance_group[0]"
    if group.count > 1:
        reason = "is above 1; parameters['num_instances'] says how many steps run at once"
        raise ConfigError(reason, file=file, field=f"{where}.count")
    if len(group.gpus) > 1:
        raise ConfigError("names more than one card; such a model has one place", file=file, field=f"{where}.gpus")
    if group.kind == ModelInstanceGroup.KIND_MODEL:
        reason = "is KIND_MODEL, which belongs to backends that place models themselves"
        raise ConfigError(reason, file=file, field=f"{where}.kind")
    if group.kind == ModelInstanceGroup.KIND_CPU:
        if needs_gpu:
            raise ConfigError("is KIND_CPU; the model was exported for cuda", file=file, field=f"{where}.kind")
        return None, False
    is_asked = group.kind == ModelInstanceGroup.KIND_GPU
    gpu = group.gpus[0] if group.gpus else 0
    if not (is_asked or needs_gpu) and (not config.instance_group or gpu not in range(num_gpus)):
        return None, False
    if gpu not in range(num_gpus):
        cause = "asks for a card" if is_asked else "was exported for cuda"
        there = f"this server can use {num_gpus}, numbered from 0" if num_gpus else "there is none this server can use"
        reason = f"the model {cause}, and cuda:{gpu} is not there: {there}"
        raise ConfigError(reason, file=file, field=f"{where}.gpus" if group.gpus else f"{where}.kind")
    return gpu, is_asked
