"""From a checkpoint to the graphs of a Whisper model: ``encoder.onnx`` and ``decoder.onnx`` with their data."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from sardonyx_export.builders.encoder_linear import EncoderLinears
from sardonyx_export.builders.graph import GraphWriter
from sardonyx_export.builders.linear import Linears
from sardonyx_export.builders.weights import Progress, WeightWriter
from sardonyx_export.builders.whisper_decoder import WhisperDecoderGraph
from sardonyx_export.builders.whisper_encoder import WhisperEncoderGraph
from sardonyx_export.builders.whisper_layers import WhisperLayers
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.whisper_spec import WhisperSpec

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"

_BLOCK_SIZE = 32
"""Of head and embedding, where they are quantised."""
_TIED_HEAD = "proj_out.weight"
# What the other graph holds.
_DECODERS = re.compile(r"model\.decoder\.(?!layers\.\d+\.encoder_attn\.[kv]_proj\.).*")
_ENCODERS = re.compile(r"model\.encoder\..*|model\.decoder\.layers\.\d+\.encoder_attn\.[kv]_proj\..*")


class WhisperBuildReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was made."""

    graphs: dict[str, list[Path]]
    """By role, ``encoder`` and ``decoder``: the graph, then its external data."""
    weights: str
    """What became of each stored format, for the manifest."""


def build_whisper(
    checkpoint: Checkpoint,
    spec: WhisperSpec,
    folder: Path,
    *,
    precision: Literal["fp32", "int8"],
    progress: Progress | None = None,
) -> WhisperBuildReport:
    """Write the graphs that `whisper_encoder` and `whisper_decoder` describe.

    Memory: one tensor in float32, and one matrix's codes; never the model.

    Args:
        checkpoint: the weights, called as in Hugging Face's layout.
        spec: what they mean.
        folder: an existing one without these files. On an error what was written so far is left in it.
        precision: of the layers' matrices, the head and the embedding. Convolutions, norms, biases and positions are
            always fp32. int8 is by integer products of rounded rows.
        progress: called with the number of weights written and of all, after each tensor.

    Raises:
        ExportError: a tensor is missing, has another shape, or is not known to this architecture.
    """
    is_quantised = precision == "int8"
    # The block-wise gather wants whole blocks.
    head_bits = 8 if is_quantised and spec.hidden_size % _BLOCK_SIZE == 0 else 32

    def write_encoder(graph: GraphWriter, weights: WeightWriter, linears: Linears) -> None:
        encoder_linears = EncoderLinears(graph, weights, linears, is_quantised=is_quantised)
        WhisperEncoderGraph(graph, weights, WhisperLayers(graph, weights, encoder_linears, spec), spec).write()

    def write_decoder(graph: GraphWriter, weights: WeightWriter, linears: Linears) -> None:
        layers = WhisperLayers(graph, weights, EncoderLinears(graph, weights, linears, is_quantised=is_quantised), spec)
        WhisperDecoderGraph(graph, weights, linears, layers, spec, head_bits=head_bits, block_size=_BLOCK_SIZE).write()

    graphs, summaries = {}, []
    for role, file_name, write, others in (
        ("encoder", ENCODER_FILE, write_encoder, _DECODERS),
        ("decoder", DECODER_FILE, write_decoder, _ENCODERS),
    ):
        graphs[role], summary = _write(checkpoint, folder, file_name, write, others, progress)
        summaries.append(f"{role}: {summary}")
    return WhisperBuildReport(graphs=graphs, weights=". ".join(summaries))


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    file_name: str,
    write: Callable[[GraphWriter, WeightWriter, Linears], None],
    others: re.Pattern[str],
    progress: Progress | None,
) -> tuple[list[Path], str]:
    """One graph's files, and what became of the weights in it."""
    with GraphWriter(folder, file_name) as graph:
        weights = WeightWriter(graph, checkpoint, _BLOCK_SIZE, progress)
        write(graph, weights, Linears(graph, _BLOCK_SIZE, has_exact_activations=False))
        weights.check_all_used(lambda name: name == _TIED_HEAD or others.fullmatch(name) is not None)
        return graph.save(file_name.removesuffix(".onnx")), weights.summary()
