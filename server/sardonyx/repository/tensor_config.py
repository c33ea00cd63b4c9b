"""A completed ModelConfig of a plain tensor model or an ensemble, as structs that the upper floors trust.

Floor 1, pure. Each part of the config has its file here; this one puts them together, and refuses what is honoured
nowhere.
"""

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.accelerators import GPU_PROVIDERS, ProviderChoice, read_providers
from sardonyx.repository.config import BACKEND, ENSEMBLE, FILE_NAME, PLATFORM
from sardonyx.repository.config_fields import refuse_fields
from sardonyx.repository.dynamic_batching import DynamicBatching, QueuePolicy, read_dynamic_batching
from sardonyx.repository.ensemble import EnsembleStep, read_steps
from sardonyx.repository.instances import Instance, read_instances
from sardonyx.repository.sequence_batching import ControlInput, SequenceBatching, StateTensor, read_sequence_batching
from sardonyx.repository.session_parameters import SessionParameters, read_session_parameters
from sardonyx.repository.tensor_spec import TensorSpec, read_inputs, read_outputs
from sardonyx.repository.warmup import WarmupInput, WarmupSample, read_warmup

__all__ = [
    "ControlInput",
    "DynamicBatching",
    "EnsembleStep",
    "Instance",
    "ProviderChoice",
    "QueuePolicy",
    "SequenceBatching",
    "SessionParameters",
    "StateTensor",
    "TensorConfig",
    "TensorSpec",
    "WarmupInput",
    "WarmupSample",
    "read_placement",
    "read_tensor_config",
]

_GRAPH_LEVELS = {0: "all", 1: "extended", -1: "basic", 2: "none"}


class TensorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the server honours of a model's config."""

    name: str
    max_batch_size: int
    """Rows of axis 0 at most. 0: tensors have no batch axis, and shapes are the graph's own."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dynamic: DynamicBatching | None = None
    """With `sequences` and `steps`, one at most is there; none: every request runs alone."""
    sequences: SequenceBatching | None = None
    steps: list[EnsembleStep] = []
    """Empty unless the model is an ensemble; instances and all below that a session needs are then empty too."""
    instances: list[Instance] = []
    session: SessionParameters = SessionParameters()
    graph_level: int = 0
    """Triton's numbers for ONNX Runtime's optimisations: 0 all, 1 extended, -1 basic, 2 none."""
    providers: list[ProviderChoice] = []
    """In the order in which they are asked for nodes. An instance on the CPU leaves ``tensorrt`` and ``cuda`` out; they
    are not listed where no instance is on a GPU."""
    warmup: list[WarmupSample] = []
    is_decoupled: bool = False
    """Calls may get any number of answers, so the protocol offers streams only."""
    uses_cache: bool = False
    """Answers are kept, and given again for equal inputs, where the server has a cache."""
    notes: list[str] = []
    """What is accepted and changes nothing, for the log."""


def read_tensor_config(config: ModelConfig, *, file: str = FILE_NAME, num_gpus: int = 0) -> TensorConfig:
    """Check a config that `autocomplete.complete_config` has completed, and read everything that is honoured.

    Args:
        config: with a name; never changed.
        file: how errors call it.
        num_gpus: cards that instances may use.

    Raises:
        ConfigError: a field that this server does not honour, and whatever contradicts itself or is out of range.

    Source: Triton, docs/user_guide/model_configuration.md; core/src/model_config_utils.cc.
    """
    refuse_fields(config, file=file)
    _check_platform(config, file)
    if config.max_batch_size < 0:
        reason = f"'max_batch_size' must be non-negative value for {config.name}"
        raise ConfigError(reason, file=file, field="max_batch_size")
    _check_cache(config, file)
    steps = read_steps(config, file=file)
    inputs = read_inputs(config, file=file)
    tensors = TensorConfig(
        name=config.name,
        max_batch_size=config.max_batch_size,
        inputs=inputs,
        outputs=read_outputs(config, file=file),
        dynamic=read_dynamic_batching(config, file=file),
        sequences=read_sequence_batching(config, file=file),
        steps=steps,
        warmup=read_warmup(config, inputs, file=file),
        is_decoupled=config.model_transaction_policy.decoupled,
        uses_cache=config.response_cache.enable,
    )
    return tensors if steps else _with_session(tensors, config, file, num_gpus)


def read_placement(config: ModelConfig, *, file: str = FILE_NAME, num_gpus: int = 0) -> TensorConfig:
    """Only what sessions are opened with: instances, providers, options. The tensors may still be open, and stay empty.

    A graph must be opened before its config can be completed from it.

    Raises:
        ConfigError: as `read_tensor_config`, about these fields.
    """
    refuse_fields(config, file=file)
    _check_platform(config, file)
    tensors = TensorConfig(name=config.name, max_batch_size=config.max_batch_size, inputs=(), outputs=())
    return _with_session(tensors, config, file, num_gpus)


def _with_session(tensors: TensorConfig, config: ModelConfig, file: str, num_gpus: int) -> TensorConfig:
    level = config.optimization.graph.level
    if level not in _GRAPH_LEVELS:
        levels = ", ".join(f"{number} ({name})" for number, name in _GRAPH_LEVELS.items())
        raise ConfigError(f"is {level}; there are {levels}", file=file, field="optimization.graph.level")
    instances = read_instances(config, num_gpus=num_gpus, file=file)
    session = read_session_parameters(config, file=file)
    providers, notes = read_providers(config, session, file=file)
    if not any(instance.kind == "gpu" for instance in instances):
        if config.optimization.execution_accelerators.gpu_execution_accelerator or session.cuda_options:
            notes.append("options of GPU providers change nothing: no instance is on a GPU")
        providers = [choice for choice in providers if choice.name not in GPU_PROVIDERS]
    if config.runtime:
        notes.append(f"runtime {config.runtime!r} changes nothing: this server is its own runtime")
    return msgspec.structs.replace(
        tensors,
        instances=instances,
        session=session,
        graph_level=level,
        providers=providers,
        notes=session.notes + notes + _state_notes(config),
    )


def _check_platform(config: ModelConfig, file: str) -> None:
    if (config.platform, config.backend) not in {(PLATFORM, BACKEND), (ENSEMBLE, "")}:
        reason = f"unexpected 'platform' and 'backend' pair, got:{config.platform}, {config.backend}"
        raise ConfigError(reason, file=file, field="platform")


def _check_cache(config: ModelConfig, file: str) -> None:
    if not config.response_cache.enable:
        return
    cause = None
    if config.HasField("sequence_batching"):
        cause = "sequence batching scheduler"
    elif config.model_transaction_policy.decoupled:
        cause = "'decoupled' transaction policy"
    if cause is not None:
        reason = (
            f"Response Cache does not currently support model {config.name} with {cause}. Please disable the response "
            "cache."
        )
        raise ConfigError(reason, file=file, field="response_cache.enable")


def _state_notes(config: ModelConfig) -> list[str]:
    return [
        f"sequence_batching.state[{index}].{name} changes nothing: states live in memory of their own"
        for index, state in enumerate(config.sequence_batching.state)
        for name in ("use_same_buffer_for_input_output", "use_growable_memory")
        if getattr(state, name)
    ]
