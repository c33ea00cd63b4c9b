"""From a checkpoint to the two files of a decoder's graph."""

from pathlib import Path
from typing import Literal

import msgspec

from sardonyx.repository.families import KvLayout
from sardonyx_export.builders import gguf_blocks
from sardonyx_export.builders.decoder_graph import DecoderGraph
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import MatrixKind, Precision, Progress, WeightWriter
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.families.llm import read_spec
from sardonyx_export.spec import DecoderSpec

Activations = Literal["fp32", "int8", "int8_rows"]

_BLOCK_SIZES = (16, 32, 64, 128, 256)


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to make of a checkpoint."""

    precision: Precision
    """Of the layers' matrices. Norms, biases and rotary tables are always fp32."""
    head_precision: Literal["fp32", "int8"] | None = None
    """Of head and embedding. ``None``: fp32 in an fp32 graph, else int8."""
    block_size: int = 32
    """Weights that share a scale."""
    activations: Activations | None = None
    """What quantised matrix products make of their other operand: keep it, round it in blocks inside the kernel, or
    round each row as a whole before it (``int8_rows``; precision int8 only, see `builders.linear`).

    ``None``: fp32 for int4 where the source's own 4-bit blocks are kept, since rounding activations would then be the
    only error (of the demo model's greedy texts, it changes every second one within 32 tokens); int8 elsewhere, where
    the weights' own error hides it.
    """
    max_model_len: int | None = None
    """Positions to serve; ``None``: as many as the checkpoint was made for."""
    target: Literal["cpu"] = "cpu"


class BuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made."""

    files: list[Path]
    """The graph, then its external data."""
    kv: KvLayout
    vocab_size: int
    max_model_len: int
    activations: Activations
    """As in `BuildOptions`; fp32 in an fp32 graph."""
    weights: str
    """What became of each stored format, for the manifest."""


def build_decoder(
    checkpoint: Checkpoint, target_dir: Path, options: BuildOptions, progress: Progress | None = None
) -> BuildReport:
    """Write ``model.onnx`` and ``model.onnx.data``, the packed-step graph of a decoder language model.

    Memory: one tensor in float32 and some copies of a part of it, with int8_rows also one matrix's codes; never the
    model.

    Args:
        checkpoint: configuration and weights.
        target_dir: an existing folder without these two files. On an error what was written so far is left in it.
        options: see `BuildOptions`.
        progress: called with the number of weights written and of all, after each tensor.

    Raises:
        ExportError: an architecture, a configuration field, a tensor or an option that is not implemented.
    """
    if options.block_size not in _BLOCK_SIZES:
        raise ExportError(f"is {options.block_size}; possible: {', '.join(map(str, _BLOCK_SIZES))}", field="block_size")
    if options.activations == "int8_rows" and options.precision != "int8":
        raise ExportError(
            f"is int8_rows, which needs precision int8; the precision is {options.precision}", field="activations"
        )
    spec = read_spec(checkpoint.config, options.max_model_len)
    activations = options.activations or _default_activations(checkpoint, options)
    head_precision: Precision = options.head_precision or ("fp32" if options.precision == "fp32" else "int8")
    layer_kind: MatrixKind = "int7_channels" if activations == "int8_rows" else options.precision
    with GraphWriter(target_dir) as graph:
        weights = WeightWriter(graph, checkpoint, options.block_size, progress)
        linears = Linears(graph, options.block_size, has_exact_activations=activations == "fp32")
        DecoderGraph(
            graph,
            weights,
            linears,
            spec,
            layer_kind=layer_kind,
            head_precision=head_precision,
            block_size=options.block_size,
        ).write()
        weights.check_all_used(lambda name: _is_ignored(name, spec))
        files = graph.save("decoder")
    described = "" if options.precision == "fp32" else f"; activations {activations}"
    return BuildReport(
        files=files,
        kv=KvLayout(num_layers=len(spec.layers), num_kv_heads=spec.num_kv_heads, head_size=spec.head_size),
        vocab_size=spec.vocab_size,
        max_model_len=spec.max_model_len,
        activations=activations,
        weights=weights.summary() + described,
    )


def _default_activations(checkpoint: Checkpoint, options: BuildOptions) -> Activations:
    if options.precision == "fp32":
        return "fp32"
    if options.precision == "int8" or options.block_size != gguf_blocks.BLOCK_SIZE:
        return "int8"
    storages = {checkpoint.tensor(name).storage for name in checkpoint.names()}
    return "fp32" if storages & gguf_blocks.FOUR_BIT_FORMATS else "int8"


def _is_ignored(name: str, spec: DecoderSpec) -> bool:
    """A tensor that some checkpoints hold and no graph needs: a tied head's copy, tables made from the config."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied_head and name == f"{spec.names.head}.weight")
