"""From a checkpoint to the graphs of a Whisper model: ``encoder.onnx`` and ``decoder.onnx`` with their data.

``aligner.onnx`` shares the decoder's data file.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from sardonyx_export.builders.encoder_linear import EncoderLinears
from sardonyx_export.builders.floats import FloatKind
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.paged_attention import default_block_size
from sardonyx_export.builders.weights import Progress, WeightWriter
from sardonyx_export.builders.whisper_aligner import Alignment, WhisperAlignerGraph
from sardonyx_export.builders.whisper_decoder import WhisperDecoderGraph
from sardonyx_export.builders.whisper_encoder import WhisperEncoderGraph
from sardonyx_export.builders.whisper_layers import WhisperLayers
from sardonyx_export.builders.whisper_paged import PagedWhisperAlignerGraph, PagedWhisperDecoderGraph
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.whisper_spec import WhisperSpec

ENCODER_FILE, DECODER_FILE, ALIGNER_FILE = "encoder.onnx", "decoder.onnx", "aligner.onnx"

WhisperPrecision = Literal["fp32", "int8", "fp16", "bf16"]
"""16 bits: for CUDA."""

_BLOCK_SIZE = 32
"""Of head and embedding, where they are quantised."""
_HEAD_MULTIPLE = 16
"""Of a head's size, as CUDA's kernels take it; see `paged_attention`."""
_TIED_HEAD = "proj_out.weight"
# What the other graph holds.
_DECODERS = re.compile(r"model\.decoder\.(?!layers\.\d+\.encoder_attn\.[kv]_proj\.).*")
_ENCODERS = re.compile(r"model\.encoder\..*|model\.decoder\.layers\.\d+\.encoder_attn\.[kv]_proj\..*")


class WhisperBuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made."""

    graphs: dict[str, list[Path]]
    """By role, ``encoder``, ``decoder`` and ``aligner``: the graph, then its external data."""
    weights: str
    """What became of each stored format, for the manifest."""
    block_size: int | None = None
    """Of the decoder's cache, in a model for CUDA."""


def build_whisper(
    checkpoint: Checkpoint,
    spec: WhisperSpec,
    folder: Path,
    *,
    precision: WhisperPrecision,
    alignment: Alignment | None = None,
    kv_block_size: int | None = None,
    progress: Progress | None = None,
) -> WhisperBuildReport:
    """Write the graphs that `whisper_encoder`, `whisper_decoder` and `whisper_aligner` describe, or `whisper_paged`.

    Memory: one tensor in float32, and one matrix's codes; never the model.

    Args:
        checkpoint: the weights, called as in Hugging Face's layout.
        spec: what they mean.
        folder: an existing one without these files. On an error what was written so far is left in it.
        precision: of the layers' matrices, the head and the embedding. int8 is by integer products of rounded rows.
            Convolutions are always fp32, and norms, biases and positions but for CUDA: fp16 and bf16 are for it.
        alignment: of the aligner; ``None``: there is none.
        kv_block_size: positions of a block of the decoder's cache on CUDA; ``None``: the least that is fast.
        progress: called with the number of weights written and of all, after each tensor.

    Raises:
        ExportError: a tensor is missing, has another shape, or is not known to this architecture; CUDA's kernels do
            not take heads of this size.
    """
    is_quantised = precision == "int8"
    floats: FloatKind = "fp32" if precision == "int8" else precision
    is_paged = floats != "fp32"
    # The block-wise gather wants whole blocks.
    head_bits = 8 if is_quantised and spec.hidden_size % _BLOCK_SIZE == 0 else 16 if is_paged else 32
    block_size = _BLOCK_SIZE
    if is_paged:
        if spec.head_size % _HEAD_MULTIPLE:
            raise ExportError(f"are {spec.head_size} wide; CUDA takes multiples of {_HEAD_MULTIPLE}", field="heads")
        block_size = kv_block_size or default_block_size(spec.head_size)
    decoder_graph = PagedWhisperDecoderGraph if is_paged else WhisperDecoderGraph
    aligner_graph = PagedWhisperAlignerGraph if is_paged else WhisperAlignerGraph

    def write_encoder(parts: _Parts) -> None:
        WhisperEncoderGraph(parts.graph, parts.weights, parts.layers, spec, floats).write()

    def write_decoder(parts: _Parts) -> None:
        decoder_graph(*parts, spec, head_bits=head_bits, block_size=block_size, floats=floats).write()

    def write_aligner(parts: _Parts) -> None:
        assert alignment is not None
        aligner = aligner_graph(*parts, spec, head_bits=head_bits, block_size=block_size, floats=floats)
        aligner.write_aligner(alignment)

    def parts(graph: GraphWriter, progress: Progress | None) -> _Parts:
        weights = WeightWriter(graph, checkpoint, _BLOCK_SIZE, progress, floats=floats)
        linears = Linears(graph, _BLOCK_SIZE, has_exact_activations=False, floats=floats)
        encoder_linears = EncoderLinears(graph, weights, linears, is_quantised=is_quantised)
        return _Parts(graph, weights, linears, WhisperLayers(graph, weights, encoder_linears, spec))

    graphs = {}
    with GraphWriter(folder, ENCODER_FILE) as encoder, GraphWriter(folder, DECODER_FILE) as decoder:
        of_encoder, of_decoder = parts(encoder, progress), parts(decoder, progress)
        graphs["encoder"] = _write(of_encoder, "encoder", write_encoder, _DECODERS)
        graphs["decoder"] = _write(of_decoder, "decoder", write_decoder, _ENCODERS)
        if alignment is not None:
            with GraphWriter(folder, ALIGNER_FILE, lender=decoder) as aligner:
                graphs["aligner"] = _write(parts(aligner, None), "aligner", write_aligner, _ENCODERS)
    weights = f"encoder: {of_encoder.weights.summary()}. decoder: {of_decoder.weights.summary()}"
    return WhisperBuildReport(graphs=graphs, weights=weights, block_size=block_size if is_paged else None)


class _Parts(NamedTuple):
    """What adds to one graph."""

    graph: GraphWriter
    weights: WeightWriter
    linears: Linears
    layers: WhisperLayers


def _write(parts: _Parts, name: str, write: Callable[[_Parts], None], others: re.Pattern[str]) -> list[Path]:
    """One graph's files."""
    write(parts)
    parts.weights.check_all_used(lambda tensor: tensor == _TIED_HEAD or others.fullmatch(tensor) is not None)
    return parts.graph.save(name)
