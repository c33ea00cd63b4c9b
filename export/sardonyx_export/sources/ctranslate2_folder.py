"""A Whisper model in CTranslate2's layout, as faster-whisper uses it, seen as a checkpoint in Hugging Face's words.

``model.bin`` holds the weights and the numbers of heads; all other sizes follow from shapes. Queries, keys and values
lie in one matrix there, and are taken apart again. Keys have a bias there, which is zero.

Source: ``specs/whisper_spec.py`` and ``converters/transformers.py`` of CTranslate2 for names and order.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sardonyx_export.checkpoint import StoredTensor
from sardonyx_export.errors import ExportError
from sardonyx_export.sources import texts
from sardonyx_export.sources.ctranslate2_file import MODEL_FILE, CTranslate2Tensor, read_ctranslate2

SPECIFICATION = "WhisperSpec"

_NORM = {"gamma": "weight", "beta": "bias"}
_LAYER = re.compile(r"(encoder|decoder)/layer_(\d+)/(.+)/(weight|bias|gamma|beta)")
_WHOLE = {
    "encoder/position_encodings/encodings": "model.encoder.embed_positions.weight",
    "decoder/position_encodings/encodings": "model.decoder.embed_positions.weight",
    "decoder/embeddings/weight": "model.decoder.embed_tokens.weight",
    **{f"encoder/{c}/{part}": f"model.encoder.{c}.{part}" for c in ("conv1", "conv2") for part in ("weight", "bias")},
    **{f"{half}/layer_norm/{part}": f"model.{half}.layer_norm.{_NORM[part]}" for half in ("encoder", "decoder")
       for part in _NORM},
}  # fmt: skip
_PARTS: dict[str, tuple[str, ...]] = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
"""What a variable of a layer is, or in equal parts of its rows, what its parts are."""
_TIED_HEAD = "decoder/projection/weight"


@dataclass(slots=True, frozen=True)
class _Rows:
    """Some rows of a variable; a `checkpoint.StoredTensor`."""

    name: str
    whole: CTranslate2Tensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.whole.shape[1:])

    @property
    def storage(self) -> str:
        return self.whole.storage

    def read(self) -> npt.NDArray[np.float32]:
        return self.whole.read()[self.start : self.stop].copy()

    def blocks(self) -> npt.NDArray[np.uint8]:
        return self.whole.blocks()


class CTranslate2Folder:
    """A `checkpoint.Checkpoint`.

    Args:
        folder: with ``model.bin``, ``config.json`` and ``tokenizer.json``.
        uri: of the source, for the manifest.
        licence: where the folder's README does not say one.
        sha256: of the archive that the folder came from.

    Raises:
        ExportError: a file is missing or damaged, or holds another model than Whisper.
    """

    def __init__(self, folder: Path, *, uri: str, licence: str | None = None, sha256: str | None = None) -> None:
        self.uri = uri
        self.sha256 = sha256
        root = texts.trusted_root(folder)
        folder = folder.resolve()
        file = read_ctranslate2(texts.inside(root, folder / MODEL_FILE))
        if file.specification != SPECIFICATION:
            raise ExportError(f"holds a {file.specification!r:.80}; Whisper is read from this format", file=MODEL_FILE)
        card = texts.read_optional(root, folder / "README.md")
        self.licence = (texts.card_licence(card) if card else None) or licence
        self._texts = {
            "tokenizer.json": texts.read_bytes(root, folder / "tokenizer.json", max_bytes=texts.MAX_TOKENIZER_BYTES),
            # Unlike Hugging Face's config.json, it says how texts are searched for.
            "generation_config.json": texts.read_bytes(root, folder / "config.json"),
        }
        self._tensors = {tensor.name: tensor for tensor in _tensors(file.variables)}
        self.config = _config(file.variables, self._tensors)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> StoredTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ExportError(f"the checkpoint has no tensor {name}") from None

    def texts(self) -> dict[str, bytes]:
        return dict(self._texts)


def _tensors(variables: dict[str, CTranslate2Tensor]) -> Iterator[_Rows]:
    for name, variable in variables.items():
        if name in _WHOLE:
            yield _Rows(_WHOLE[name], variable, 0, variable.shape[0] if variable.shape else 0)
            continue
        place = _LAYER.fullmatch(name)
        if place is None or place[3] not in _PARTS:
            if variable.shape and name != _TIED_HEAD:
                raise ExportError("is a variable that Whisper does not have", file=MODEL_FILE, field=name)
            continue  # a flag or a number
        half, index, part, kind = place.groups()
        names = _PARTS[part]
        num_rows = variable.shape[0] // len(names) if variable.shape else 0
        for i, each in enumerate(names):
            rows = _Rows(
                f"model.{half}.layers.{index}.{each}.{_NORM.get(kind, kind)}",
                variable,
                i * num_rows,
                (i + 1) * num_rows,
            )
            if not (each.endswith("k_proj") and kind == "bias"):
                yield rows
            elif rows.read().any():
                raise ExportError("has a bias for keys, which Whisper has not", file=MODEL_FILE, field=name)


def _config(variables: dict[str, CTranslate2Tensor], tensors: dict[str, _Rows]) -> dict[str, Any]:
    """The sizes, as ``config.json`` of Hugging Face's layout has them."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        tensor = tensors.get(name)
        if tensor is None or len(tensor.shape) != rank:
            raise ExportError(f"is missing or has not {rank} axes", file=MODEL_FILE, field=name)
        return tensor.shape

    def num_heads(half: str) -> int:
        variable = variables.get(f"{half}/num_heads")
        if variable is None:
            raise ExportError("is missing", file=MODEL_FILE, field=f"{half}/num_heads")
        return variable.scalar()

    def num_layers(half: str) -> int:
        return len({name.split(".")[3] for name in tensors if name.startswith(f"model.{half}.layers.")})

    vocab_size, hidden_size = shape("model.decoder.embed_tokens.weight", 2)
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": vocab_size,
        "d_model": hidden_size,
        "num_mel_bins": shape("model.encoder.conv1.weight", 3)[1],
        "max_source_positions": shape("model.encoder.embed_positions.weight", 2)[0],
        "max_target_positions": shape("model.decoder.embed_positions.weight", 2)[0],
        "encoder_layers": num_layers("encoder"),
        "decoder_layers": num_layers("decoder"),
        "encoder_attention_heads": num_heads("encoder"),
        "decoder_attention_heads": num_heads("decoder"),
        "encoder_ffn_dim": shape("model.encoder.layers.0.fc1.weight", 2)[0],
        "decoder_ffn_dim": shape("model.decoder.layers.0.fc1.weight", 2)[0],
    }
