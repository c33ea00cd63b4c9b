"""Models that are made of other models: Triton's ``ensemble_scheduling``.

Floor 1. Here is what one config tells: that data can flow from the ensemble's inputs through every step to its outputs.
Whether the models of the steps exist and fit is for who loads them.
"""

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import ENSEMBLE, FILE_NAME

_STEP = "ensemble_scheduling.step"


class EnsembleStep(msgspec.Struct, frozen=True, kw_only=True):
    """One model of an ensemble. A step runs when all of its inputs are there; the order in the file means nothing."""

    model_name: str
    model_version: int | None = None
    """``None``: the latest that is ready."""
    input_map: dict[str, str]
    """The model's input → the ensemble's tensor."""
    output_map: dict[str, str]
    """The model's output → the ensemble's tensor."""


def part_names(config: ModelConfig) -> tuple[str, ...]:
    """Models that an ensemble is made of, each once; none of any other model."""
    return tuple(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step))


def read_steps(config: ModelConfig, *, file: str = FILE_NAME) -> list[EnsembleStep]:
    """Check and read the steps; none where the model is no ensemble.

    Raises:
        ConfigError: a field that an ensemble cannot have, a step without model or maps, a tensor that is written
            twice, is never written, or leads nowhere; a circle.
    """
    if not config.HasField("ensemble_scheduling"):
        if config.platform == ENSEMBLE:
            reason = f"ensemble scheduling must be set for ensemble {config.name} whose platform is {ENSEMBLE}"
            raise ConfigError(reason, file=file, field="ensemble_scheduling")
        return []
    _check_fields(config, file)
    steps = [_step(config, index, file) for index in range(len(config.ensemble_scheduling.step))]
    _check_writers(config, steps, file)
    _check_flow(config, steps, file)
    return steps


def _check_fields(config: ModelConfig, file: str) -> None:
    if config.platform != ENSEMBLE:
        reason = f"ensemble scheduling cannot be set for model '{config.name}' whose platform is not {ENSEMBLE}"
        raise ConfigError(reason, file=file, field="platform")
    if config.instance_group:
        reason = f"instance group should not be specified for ensemble '{config.name}'"
        raise ConfigError(reason, file=file, field="instance_group")
    if config.HasField("optimization"):
        reason = f"optimization should not be specified for ensemble '{config.name}'"
        raise ConfigError(reason, file=file, field="optimization")
    if config.model_warmup:
        reason = f"model_warmup can not be specified for ensemble '{config.name}'"
        raise ConfigError(reason, file=file, field="model_warmup")
    for name in ("parameters", "default_model_filename", "runtime"):
        if getattr(config, name):
            raise ConfigError("has no meaning for an ensemble", file=file, field=name)
    if not config.ensemble_scheduling.step:
        raise ConfigError(f"must specify 'step' for ensemble '{config.name}'", file=file, field=_STEP)


def _step(config: ModelConfig, index: int, file: str) -> EnsembleStep:
    step = config.ensemble_scheduling.step[index]
    for name in ("model_name", "input_map", "output_map"):
        if not getattr(step, name):
            reason = f"must specify '{name}' in step {index} of ensemble '{config.name}'"
            raise ConfigError(reason, file=file, field=f"{_STEP}[{index}].{name}")
    if step.model_name == config.name:
        reason = f"circular dependency between ensembles: {config.name} is a step of itself"
        raise ConfigError(reason, file=file, field=f"{_STEP}[{index}].model_name")
    if step.model_version < -1:
        reason = "is a version from 1 up, or -1 for the latest"
        raise ConfigError(reason, file=file, field=f"{_STEP}[{index}].model_version")
    for name in ("input_map", "output_map"):
        if not all(getattr(step, name).values()):
            raise ConfigError("maps to a tensor without name", file=file, field=f"{_STEP}[{index}].{name}")
    return EnsembleStep(
        model_name=step.model_name,
        # A field that is not there is 0 in proto3; a version 0 does not exist.
        model_version=step.model_version if step.model_version > 0 else None,
        input_map=dict(sorted(step.input_map.items())),
        output_map=dict(sorted(step.output_map.items())),
    )


def _check_writers(config: ModelConfig, steps: list[EnsembleStep], file: str) -> None:
    written: set[str] = set()
    inputs = {item.name for item in config.input}
    for index, step in enumerate(steps):
        for tensor in step.output_map.values():
            field = f"{_STEP}[{index}].output_map"
            if tensor in written:
                reason = (
                    f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{config.name}' "
                    f"step {index}"
                )
                raise ConfigError(reason, file=file, field=field)
            if tensor in inputs:
                reason = f"ensemble input '{tensor}' is written by step {index} of ensemble '{config.name}'"
                raise ConfigError(reason, file=file, field=field)
            written.add(tensor)


def _check_flow(config: ModelConfig, steps: list[EnsembleStep], file: str) -> None:
    read = {tensor for step in steps for tensor in step.input_map.values()}
    written = {tensor for step in steps for tensor in step.output_map.values()}
    outputs = {item.name for item in config.output}
    for item in config.input:
        if item.name not in read:
            reason = f"ensemble input '{item.name}' for ensemble {config.name}' is not used"
            raise ConfigError(reason, file=file, field="input")
    for name in sorted(outputs - read - written):
        raise ConfigError(
            f"ensemble output '{name}' for ensemble {config.name}' is not used", file=file, field="output"
        )
    ready = _reachable(steps, {item.name for item in config.input})
    for name in sorted(outputs - ready):
        cause = _missing_source(steps, ready, name)
        detail = f": at least one of its depending tensors, '{cause}', is not connected" if cause != name else ""
        reason = f"output '{name}' for ensemble '{config.name}' is not written{detail}"
        raise ConfigError(reason, file=file, field="output")
    for name in sorted((read | written) - outputs):
        if name not in ready or name not in read:
            reason = f"ensemble tensor '{name}' is unused in ensemble '{config.name}'"
            raise ConfigError(reason, file=file, field=_STEP)


def _reachable(steps: list[EnsembleStep], inputs: set[str]) -> set[str]:
    """The tensors that get a value once `inputs` have one."""
    ready = set(inputs)
    waiting = list(steps)
    while runnable := [step for step in waiting if ready.issuperset(step.input_map.values())]:
        for step in runnable:
            ready.update(step.output_map.values())
        waiting = [step for step in waiting if step not in runnable]
    return ready


def _missing_source(steps: list[EnsembleStep], ready: set[str], name: str) -> str:
    """Follow what is missing from `name` back to where it begins, or to where a circle closes."""
    seen = {name}
    while True:
        writer = next((step for step in steps if name in step.output_map.values()), None)
        needed = set(writer.input_map.values()) - ready - seen if writer is not None else set()
        if not needed:
            return name
        name = min(needed)
        seen.add(name)
