"""From a checkpoint to the graphs of a Whisper model: ``encoder.onnx`` and ``decoder.onnx`` with their data.

``aligner.onnx`` shares the decoder's data file.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from sardonyx_export.builders.encoder_linear import EncoderLinears
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import Progress, WeightWriter
from sardonyx_export.builders.whisper_aligner import Alignment, WhisperAlignerGraph
from sardonyx_export.builders.whisper_decoder import WhisperDecoderGraph
from sardonyx_export.builders.whisper_encoder import WhisperEncoderGraph
from sardonyx_export.builders.whisper_layers import WhisperLayers
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.whisper_spec import WhisperSpec

ENCODER_FILE, DECODER_FILE, ALIGNER_FILE = "encoder.onnx", "decoder.onnx", "aligner.onnx"

_BLOCK_SIZE = 32
"""Of head and embedding, where they are quantised."""
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


def build_whisper(
    checkpoint: Checkpoint,
    spec: WhisperSpec,
    folder: Path,
    *,
    precision: Literal["fp32", "int8"],
    alignment: Alignment | None = None,
    progress: Progress | None = None,
) -> WhisperBuildReport:
    """Write the graphs that `whisper_encoder`, `whisper_decoder` and `whisper_aligner` describe.

    Memory: one tensor in float32, and one matrix's codes; never the model.

    Args:
        checkpoint: the weights, called as in Hugging Face's layout.
        spec: what they mean.
        folder: an existing one without these files. On an error what was written so far is left in it.
        precision: of the layers' matrices, the head and the embedding. Convolutions, norms, biases and positions are
            always fp32. int8 is by integer products of rounded rows.
        alignment: of the aligner; ``None``: there is none.
        progress: called with the number of weights written and of all, after each tensor.

    Raises:
        ExportError: a tensor is missing, has another shape, or is not known to this architecture.
    """
    is_quantised = precision == "int8"
    # The block-wise gather wants whole blocks.
    head_bits = 8 if is_quantised and spec.hidden_size % _BLOCK_SIZE == 0 else 32

    def write_encoder(parts: _Parts) -> None:
        WhisperEncoderGraph(parts.graph, parts.weights, parts.layers, spec).write()

    def write_decoder(parts: _Parts) -> None:
        decoder = WhisperDecoderGraph(*parts, spec, head_bits=head_bits, block_size=_BLOCK_SIZE)
        decoder.write()

    def write_aligner(parts: _Parts) -> None:
        assert alignment is not None
        aligner = WhisperAlignerGraph(*parts, spec, head_bits=head_bits, block_size=_BLOCK_SIZE)
        aligner.write_aligner(alignment)

    def parts(graph: GraphWriter, progress: Progress | None) -> _Parts:
        weights = WeightWriter(graph, checkpoint, _BLOCK_SIZE, progress)
        linears = Linears(graph, _BLOCK_SIZE, has_exact_activations=False)
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
    return WhisperBuildReport(graphs=graphs, weights=weights)


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
