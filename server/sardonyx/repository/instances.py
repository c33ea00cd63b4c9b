"""How many instances of a model run, and where: Triton's ``instance_group``.

Floor 1. How many GPUs there are is told, never asked.
"""

from typing import Literal

import msgspec
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from sardonyx.errors import ConfigError
from sardonyx.repository.config import ENSEMBLE, FILE_NAME

MAX_INSTANCES = 1024
"""A thread runs each, so a number from a file is bounded."""

# What Triton takes for ONNX Runtime, so that one instance prepares inputs while another computes.
_DEFAULT_CPU_COUNT = 2


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One instance: it runs one batch at a time. Instances on one device may share a session."""

    kind: Literal["cpu", "gpu"]
    gpu: int | None = None
    """Number of the card."""
    name: str = ""
    """Its group's and its number in it, for logs."""


def normalize_instance_groups(config: ModelConfig, num_gpus: int) -> None:
    """Fill in place what groups leave open: a first group, names, kinds, counts and GPUs. Ensembles have none.

    A group of no kind takes the GPUs if all that it names are there, else the CPU.
    """
    if config.platform == ENSEMBLE or config.HasField("ensemble_scheduling"):
        return
    if not config.instance_group:
        config.instance_group.add(name=config.name)
    available = range(num_gpus)
    for index, group in enumerate(config.instance_group):
        group.name = group.name or f"{config.name}_{index}"
        if group.kind == ModelInstanceGroup.KIND_AUTO:
            has_gpus = num_gpus > 0 and all(gpu in available for gpu in group.gpus)
            group.kind = ModelInstanceGroup.KIND_GPU if has_gpus else ModelInstanceGroup.KIND_CPU
        if group.count < 1:
            group.count = _DEFAULT_CPU_COUNT if group.kind == ModelInstanceGroup.KIND_CPU else 1
        if group.kind == ModelInstanceGroup.KIND_GPU and not group.gpus:
            group.gpus.extend(available)


def read_instances(config: ModelConfig, *, num_gpus: int, file: str = FILE_NAME) -> list[Instance]:
    """Check the groups and list their instances, a group's `count` on each of its GPUs.

    Raises:
        ConfigError: a kind that we do not have, GPUs that are not there or do not suit the kind, too many instances.
    """
    full = ModelConfig()
    full.CopyFrom(config)
    normalize_instance_groups(full, num_gpus)
    instances: list[Instance] = []
    for index, group in enumerate(full.instance_group):
        where = f"instance_group[{index}]"
        subject = f"instance group {group.name} of model {config.name}"
        if problem := _problem(group, num_gpus):
            part, text = problem
            raise ConfigError(f"{subject} {text}", file=file, field=f"{where}.{part}")
        gpus: list[int | None] = list(group.gpus) or [None]
        if len(instances) + group.count * len(gpus) > MAX_INSTANCES:
            reason = f"makes more than {MAX_INSTANCES:,} instances of model {config.name}"
            raise ConfigError(reason, file=file, field=f"{where}.count")
        for number in range(group.count * len(gpus)):
            gpu = gpus[number // group.count]
            kind: Literal["cpu", "gpu"] = "cpu" if gpu is None else "gpu"
            instances.append(Instance(kind=kind, gpu=gpu, name=f"{group.name}_{number}"))
    return instances


def _problem(group: ModelInstanceGroup, num_gpus: int) -> tuple[str, str] | None:
    if group.kind == ModelInstanceGroup.KIND_MODEL:
        return "kind", "has kind KIND_MODEL, which belongs to backends that place models themselves"
    if group.kind == ModelInstanceGroup.KIND_CPU:
        return ("gpus", "has kind KIND_CPU but specifies one or more GPUs") if group.gpus else None
    if not group.gpus:
        return "kind", "has kind KIND_GPU but no GPUs are available"
    for gpu in group.gpus:
        if gpu not in range(num_gpus):
            there = ", ".join(map(str, range(num_gpus))) or "none"
            return "gpus", f"specifies invalid or unsupported gpu id {gpu}. GPUs that are available: {there}"
    return None
