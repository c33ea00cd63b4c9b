"""From a checkpoint to the two files of a text encoder's packed graph."""

import re
from pathlib import Path
from typing import Literal

import msgspec

from sardonyx_export.builders.encoder_graph import EncoderGraph
from sardonyx_export.builders.floats import FloatKind
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.weights import Progress, WeightWriter
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.encoder_spec import EncoderSpec, Head

EncoderPrecision = Literal["fp32", "int8", "fp16", "bf16"]

# Of the quantised word table: the largest that divides the hidden size.
_BLOCK_SIZES = (128, 64, 32, 16)
# What lies in checkpoints beside an encoder: buffers, language modelling heads, poolers, and the heads that come to
# `build_encoder` as a `Head`. Before it may stand the model's own prefix.
_BESIDE = re.compile(
    r"(\w+\.)?("
    r"(embeddings\.)?position_ids|embeddings\.token_type_ids|(\w+\.)*rotary_emb\.\w*inv_freq|"
    r"pooler\.dense\.\w+|"
    r"(cls|lm_head)\.[\w.]+|"
    r"(vocab_transform|vocab_layer_norm|vocab_projector|decoder)\.\w+|"
    r"(pre_classifier|classifier|classifier\.dense|classifier\.out_proj)\.\w+|"
    r"head\.(dense|norm)\.\w+"
    r")"
)


class EncoderBuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made."""

    files: list[Path]
    """The graph, then its external data."""
    activations: Literal["fp32", "int8_rows", "fp16", "bf16"]
    """As in the manifest."""
    weights: str
    """What became of each stored format, for the manifest."""


def build_encoder(
    checkpoint: Checkpoint,
    spec: EncoderSpec,
    head: Head,
    folder: Path,
    *,
    precision: EncoderPrecision,
    output: str,
    progress: Progress | None = None,
) -> EncoderBuildReport:
    """Write ``model.onnx`` and ``model.onnx.data``, a graph of the packed layout of `families.Encoder`.

    It takes token_type_ids where the model has more than one type, and num_prompt_tokens where the head leaves the
    prompt out.

    Memory: one tensor in float32, and one matrix's codes; never the model.

    Args:
        checkpoint: the weights.
        spec: what they mean.
        head: from a row's token vectors to its result; always float32.
        folder: an existing one without these two files. On an error what was written so far is left in it.
        precision: of the layers' matrices and the word table. fp32 and int8 are for the CPU, their norms, biases and
            other tables fp32. fp16 and bf16 are for CUDA, in which all is computed but pooling and head.
        output: name of the graph's output (B, width) float32.
        progress: called with the number of weights written and of all, after each tensor.

    Raises:
        ExportError: a tensor is missing, has another shape, or is not known to this architecture.
    """
    is_quantised = precision == "int8"
    block_size = next((size for size in _BLOCK_SIZES if spec.hidden_size % size == 0), None) if is_quantised else None
    floats: FloatKind = "fp32" if precision == "int8" else precision
    with GraphWriter(folder) as graph:
        weights = WeightWriter(graph, checkpoint, block_size or 0, progress, floats=floats)
        EncoderGraph(graph, weights, spec, head, block_size=block_size, is_quantised=is_quantised, floats=floats).write(
            output
        )
        weights.check_all_used(lambda name: _BESIDE.fullmatch(name) is not None)
        files = graph.save("encoder")
    activations: Literal["fp32", "int8_rows", "fp16", "bf16"] = "int8_rows" if is_quantised else floats
    described = f"; activations {activations}" if is_quantised else ""
    return EncoderBuildReport(files=files, activations=activations, weights=weights.summary() + described)
