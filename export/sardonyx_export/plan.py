"""What an export will build, decided before anything is written."""

import math
from collections import Counter
from typing import Literal

import msgspec

from sardonyx.repository.manifest import Family
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import has_wide_activations
from sardonyx_export.kv_ranges import KvCacheDtype

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Target = Literal["cpu", "cuda"]
Activations = Literal["fp32", "int8", "int8_rows", "fp16", "bf16"]
Task = Literal[
    "text-generation", "embeddings", "reranker", "classifier", "image-classifier", "transcription", "text-to-image"
]
FAMILY_OF_TASK: dict[Task, Family] = {
    "text-generation": "llm",
    "embeddings": "embeddings",
    "reranker": "reranker",
    "classifier": "classifier",
    "image-classifier": "image_classifier",
    "transcription": "whisper",
    "text-to-image": "diffusion",
}

PAGED_NOTE = "in numpy, not on CUDA"
"""Begins `Parity.reference` where a graph for CUDA was verified: its operators exist there only, see
`stages.paged_verify`."""

CHECK_NOTE = "with equal operators of the CPU, not on CUDA"
"""Begins `Parity.reference` where a traced graph for CUDA was verified, see `traced_cuda.write_check_graph`."""

_BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.125, "int4": 0.625}
"""With a float32 scale for every 32 weights."""
_COARSE_STORAGE_PREFIXES = ("Q2", "Q3", "Q4", "IQ", "TQ", "MXFP4", "NVFP4")
_ENDS = ("model.embed_tokens.weight", "lm_head.weight")
"""Kept at 8 bits in an int4 graph."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One export."""

    name: str
    """Of the model in the repository."""
    family: Family = "llm"
    architecture: str
    precision: Precision
    activations: Activations | None
    """What the kernels make of activations; ``None``: the builder's choice, see `builders.decoder.BuildOptions`."""
    max_model_len: int | None
    """Positions that the graph is built for; ``None`` where it reads no tokens."""
    target: Target = "cpu"
    kv_cache_dtype: KvCacheDtype | None = None
    """Of a quantised KV cache."""
    num_parameters: int
    storage: dict[str, int]
    """Weights by how the source stores them."""
    estimated_bytes: int
    """What the version will take on disk, roughly."""


def make_plan(
    checkpoint: Checkpoint,
    *,
    name: str,
    precision: Precision | Literal["auto"] = "auto",
    activations: Activations | None = None,
    max_model_len: int | None = None,
    target: Target = "cpu",
    kv_cache_dtype: KvCacheDtype | None = None,
) -> Plan:
    """Decide precision and context.

    Precision ``auto``, on CPU, is int4 where the source's own matrices have about 4 bits already, since more bits
    would cost speed and bring nothing back; else int8. Rounding full weights to int4 visibly hurts small models, and
    fp32 is twice as slow at one sequence as int8. Activations ``int8_rows`` leave int8 only. For CUDA it is 16 bits
    where the source has no 4-bit blocks: what the activations say, else bf16 where fp16 might overflow.

    Raises:
        ExportError: more positions than the model was made for, or a configuration without its basic fields.
    """
    context = checkpoint.config.get("max_position_embeddings")
    if not isinstance(context, int) or context < 1:
        raise ExportError("is missing or no number", file="config.json", field="max_position_embeddings")
    if max_model_len is not None and not 1 <= max_model_len <= context:
        raise ExportError(f"is {max_model_len:,}; this model takes 1 to {context:,}", field="--max-model-len")
    storage: Counter[str] = Counter()
    num_coarse = num_weights = 0
    for tensor_name in checkpoint.names():
        tensor = checkpoint.tensor(tensor_name)
        size = math.prod(tensor.shape)
        storage[tensor.storage] += size
        if len(tensor.shape) > 1 and tensor_name not in _ENDS:
            num_weights += size
            num_coarse += size if tensor.storage.startswith(_COARSE_STORAGE_PREFIXES) else 0
    is_coarse = num_coarse > num_weights / 2 and activations != "int8_rows"
    chosen = precision
    if chosen == "auto":
        chosen = "int4" if is_coarse else "int8" if target == "cpu" else _floats(checkpoint, activations)
    num_parameters = storage.total()
    estimate = num_weights * _BYTES_PER_WEIGHT[chosen]
    is_whole = chosen in ("fp32", "fp16", "bf16")
    estimate += (num_parameters - num_weights) * _BYTES_PER_WEIGHT[chosen if is_whole else "int8"]
    return Plan(
        name=name,
        architecture=checkpoint.config["architectures"][0],
        precision=chosen,
        activations=activations,
        max_model_len=max_model_len or context,
        target=target,
        kv_cache_dtype=kv_cache_dtype,
        num_parameters=num_parameters,
        storage=dict(storage.most_common()),
        estimated_bytes=int(estimate),
    )


def _floats(checkpoint: Checkpoint, activations: Activations | None) -> Precision:
    if activations is None:
        return "bf16" if has_wide_activations(checkpoint) else "fp16"
    return "bf16" if activations == "bf16" else "fp16"
