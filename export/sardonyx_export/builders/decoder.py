"""From a checkpoint to the two files of a decoder's graph, and to the sampler's beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from sardonyx.repository.families import KvLayout
from sardonyx_export.builders import gguf_blocks
from sardonyx_export.builders.decoder_graph import Attention, DecoderGraph
from sardonyx_export.builders.floats import FloatKind
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.kv_scales import DATATYPES as CACHE_DATATYPES
from sardonyx_export.builders.kv_scales import KvScales
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.paged_attention import PagedAttention, default_block_size
from sardonyx_export.builders.sampler import build_sampler
from sardonyx_export.builders.slot_attention import SlotAttention
from sardonyx_export.builders.weights import MatrixKind, Precision, Progress, WeightWriter
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import has_wide_activations, read_spec
from sardonyx_export.kv_ranges import KvCacheDtype, KvRange
from sardonyx_export.spec import DecoderSpec

Activations = Literal["fp32", "int8", "int8_rows", "fp16", "bf16"]

_BLOCK_SIZES = (16, 32, 64, 128, 256)
_MIN_KV_BLOCK_SIZE = 16
_FUSED_BLOCK_SIZES = (32, 64, 128)
"""Of CUDA's products with 16-bit activations."""
_DATATYPES: dict[FloatKind, Literal["FP32", "FP16", "BF16"]] = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to make of a checkpoint."""

    precision: Precision
    """Of the layers' matrices: fp32, int8 or int4 for the CPU, fp16, bf16, int8 or int4 for CUDA. Norms, biases and
    rotary tables are fp32 on the CPU, and of the activations' type on CUDA."""
    head_precision: Literal["fp32", "int8"] | None = None
    """Of head and embedding. ``None``: whole where the layers' matrices are, else int8."""
    block_size: int = 32
    """Weights that share a scale."""
    activations: Activations | None = None
    """What quantised matrix products make of their other operand: keep it, round it in blocks inside the kernel, or
    round each row as a whole before it (``int8_rows``; precision int8 only, see `builders.linear`).

    ``None``: fp32 for int4 where the source's own 4-bit blocks are kept, since rounding activations would then be the
    only error (of the demo model's greedy texts, it changes every second one within 32 tokens); int8 elsewhere, where
    the weights' own error hides it.

    CUDA: fp16 or bf16, of all that is computed but logits. ``None``: as the precision says; beside int8 and int4 bf16
    where that is safer, see `families.llm`.
    """
    max_model_len: int | None = None
    """Positions to serve; ``None``: as many as the checkpoint was made for."""
    target: Literal["cpu", "cuda"] = "cpu"
    """cuda: attention over blocks, 16-bit activations, and a graph that samples."""
    kv_block_size: int | None = None
    """Positions of a block of CUDA's cache, a power of two; ``None``: the smallest that FlashAttention reads."""
    kv_cache_dtype: KvCacheDtype | None = None
    """Of CUDA's cache; ``None``: the activations'."""


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made."""

    files: list[Path]
    """The graph, then its external data."""
    kv: KvLayout
    vocab_size: int
    max_model_len: int
    activations: Activations
    """As in `BuildOptions`; fp32 in an fp32 graph."""
    sampler: list[Path] = []
    """The graph that samples, and its external data; none for the CPU."""
    weights: str
    """What became of each stored format, for the manifest."""


def build_decoder(
    checkpoint: Checkpoint,
    target_dir: Path,
    options: BuildOptions,
    progress: Progress | None = None,
    *,
    kv_ranges: Sequence[KvRange] = (),
) -> BuildReport:
    """Write ``model.onnx`` and ``model.onnx.data``, the packed-step graph of a decoder language model.

    For CUDA that is the paged-step graph, and ``sampler.onnx`` beside it.

    Memory: one tensor in float32 and some copies of a part of it, with int8_rows also one matrix's codes; never the
    model.

    Args:
        checkpoint: configuration and weights.
        target_dir: an existing folder without these two files. On an error what was written so far is left in it.
        options: see `BuildOptions`.
        progress: called with the number of weights written and of all, after each tensor.
        kv_ranges: of each layer, where the cache is quantised.

    Raises:
        ExportError: an architecture, a configuration field, a tensor or an option that is not implemented.
    """
    check_options(options)
    spec = read_spec(checkpoint.config, options.max_model_len)
    activations = options.activations or _default_activations(checkpoint, options)
    floats: FloatKind = "bf16" if activations == "bf16" else "fp16" if activations == "fp16" else "fp32"
    is_whole = options.precision in ("fp32", "fp16", "bf16")
    head_precision: Precision = options.head_precision or (options.precision if is_whole else "int8")
    layer_kind: MatrixKind = "int7_channels" if activations == "int8_rows" else options.precision
    kv_block_size = options.kv_block_size or default_block_size(spec.head_size)
    with GraphWriter(target_dir) as graph:
        weights = WeightWriter(graph, checkpoint, options.block_size, progress, floats=floats)
        linears = Linears(graph, options.block_size, has_exact_activations=activations == "fp32", floats=floats)
        attention: Attention = SlotAttention(graph, weights, spec)
        if options.target == "cuda":
            scales = KvScales(graph, options.kv_cache_dtype, kv_ranges) if options.kv_cache_dtype else None
            attention = PagedAttention(graph, weights, spec, floats, kv_block_size, scales)
        DecoderGraph(
            graph,
            weights,
            linears,
            attention,
            spec,
            layer_kind=layer_kind,
            head_precision=head_precision,
            block_size=options.block_size,
            floats=floats,
        ).write()
        weights.check_all_used(lambda name: _is_ignored(name, spec))
        files = graph.save("decoder")
    kv = KvLayout(
        num_layers=len(spec.layers),
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        datatype=CACHE_DATATYPES[options.kv_cache_dtype] if options.kv_cache_dtype else _DATATYPES[floats],
        block_size=kv_block_size if options.target == "cuda" else None,
    )
    return BuildReport(
        files=files,
        sampler=build_sampler(spec.vocab_size, target_dir) if options.target == "cuda" else [],
        kv=kv,
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        activations=activations,
        weights=weights.summary() + ("" if is_whole else f"; activations {activations}"),
    )


def check_options(options: BuildOptions) -> None:
    """Raise ExportError unless what is asked for exists and goes together."""
    is_cuda = options.target == "cuda"
    block_sizes = _FUSED_BLOCK_SIZES if is_cuda else _BLOCK_SIZES
    if options.block_size not in block_sizes:
        raise ExportError(f"is {options.block_size}; possible: {', '.join(map(str, block_sizes))}", field="block_size")
    if options.activations == "int8_rows" and options.precision != "int8":
        raise ExportError(
            f"is int8_rows, which needs precision int8; the precision is {options.precision}", field="activations"
        )
    possible: tuple[Precision, ...] = ("fp16", "bf16", "int8", "int4") if is_cuda else ("fp32", "int8", "int4")
    if options.precision not in possible:
        raise ExportError(
            f"is {options.precision}; for the target {options.target} {', '.join(possible)} are possible",
            field="precision",
        )
    kept: tuple[Activations | None, ...] = (None, "fp16", "bf16") if is_cuda else (None, "fp32", "int8", "int8_rows")
    if options.activations not in kept or (
        is_cuda and options.precision in ("fp16", "bf16") and options.activations not in (None, options.precision)
    ):
        raise ExportError(
            f"is {options.activations}, which does not go with precision {options.precision} and target "
            f"{options.target}",
            field="activations",
        )
    if options.kv_cache_dtype is not None and not is_cuda:
        raise ExportError(
            f"is {options.kv_cache_dtype}; for the target cpu the cache is float32", field="kv_cache_dtype"
        )
    size = options.kv_block_size
    if size is not None and (size < _MIN_KV_BLOCK_SIZE or size & (size - 1)):
        raise ExportError(f"is {size}; a power of two from {_MIN_KV_BLOCK_SIZE} is possible", field="kv_block_size")


def _default_activations(checkpoint: Checkpoint, options: BuildOptions) -> Activations:
    if options.precision in ("fp32", "fp16", "bf16"):
        return options.precision
    if options.target == "cuda":
        return "bf16" if has_wide_activations(checkpoint) else "fp16"
    if options.precision == "int8" or options.block_size != gguf_blocks.BLOCK_SIZE:
        return "int8"
    storages = {checkpoint.tensor(name).storage for name in checkpoint.names()}
    return "fp32" if storages & gguf_blocks.FOUR_BIT_FORMATS else "int8"


def _is_ignored(name: str, spec: DecoderSpec) -> bool:
    """A tensor that some checkpoints hold and no graph needs: a tied head's copy, tables made from the config."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied_head and name == f"{spec.names.head}.weight")
