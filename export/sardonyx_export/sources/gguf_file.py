"""A GGUF file as a checkpoint: tensors under Hugging Face's names, rows in Hugging Face's order."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from sardonyx_export.errors import ExportError
from sardonyx_export.sources import gguf_config
from sardonyx_export.sources.gguf_architectures import GgufArchitecture
from sardonyx_export.sources.gguf_header import GgufHeader, TensorInfo, read_header
from sardonyx_export.sources.gguf_tokenizer import build_texts

_CHUNK_VALUES = 4 << 20
"""What is dequantised at once; numpy needs some 10 bytes a value for it."""
_LAYER = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)\.(weight|bias)")
_FLOATS = {"F32", "F16", "BF16", "F64"}
_GLOBAL_NAMES = {
    gguf_config.EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    gguf_config.HEAD: "lm_head.weight",
}


@dataclass(slots=True, frozen=True)
class GgufTensor:
    """A tensor of a GGUF file; a `checkpoint.StoredTensor`."""

    path: Path
    info: TensorInfo
    name: str
    num_permuted_heads: int = 0
    """Heads whose rows llama.cpp interleaved; 0: rows lie as they should."""
    norm_offset: float = 0.0
    """What llama.cpp added to the values."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def storage(self) -> str:
        return self.info.qtype.name

    def read(self) -> npt.NDArray[np.float32]:
        """The tensor in float32, dequantised some rows at a time.

        Raises:
            ExportError: a block type that cannot be dequantised here, or the file is shorter than when it was opened.
        """
        num_rows, row_bytes = self._rows()
        out = np.empty((num_rows, self.shape[-1]), np.float32)
        step = max(1, _CHUNK_VALUES // self.shape[-1])
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            try:
                out[start:stop] = gguf.dequantize(self._read_rows(start, stop, row_bytes), self.info.qtype)
            except NotImplementedError:
                raise ExportError(
                    f"{self.storage} blocks cannot be read", file=self.path.name, field=self.name
                ) from None
        values = out.reshape(self.shape)
        if self.norm_offset:
            values -= np.float32(self.norm_offset)
        return values[self._row_order()] if self.num_permuted_heads else values

    def blocks(self) -> npt.NDArray[np.uint8]:
        if self.storage in _FLOATS:
            raise ValueError(f"{self.name} is stored as {self.storage}, which has no blocks")
        num_rows, row_bytes = self._rows()
        raw = self._read_rows(0, num_rows, row_bytes)
        return raw[self._row_order()] if self.num_permuted_heads else raw

    def _rows(self) -> tuple[int, int]:
        num_rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return num_rows, self.info.num_bytes // num_rows

    def _read_rows(self, start: int, stop: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        offset = self.info.offset + start * row_bytes
        data = np.fromfile(self.path, np.uint8, (stop - start) * row_bytes, offset=offset)
        if data.size != (stop - start) * row_bytes:
            raise ExportError("ended early while it was read", file=self.path.name, field=self.name)
        return data.reshape(stop - start, row_bytes)

    def _row_order(self) -> npt.NDArray[np.int64]:
        """For each row in Hugging Face's order, its row in the file.

        llama.cpp rotates neighbours, Hugging Face the two halves of a head: the converter turned (head, half, i) into
        (head, i, half).
        """
        rows = np.arange(self.shape[0], dtype=np.int64)
        return rows.reshape(self.num_permuted_heads, -1, 2).swapaxes(1, 2).reshape(-1)


class GgufFile:
    """A `checkpoint.Checkpoint` over a GGUF file.

    Args:
        path: on disk, readable while the export runs.
        uri: what the manifest names as source.
        licence: where the caller knows it from elsewhere; ``general.license`` in the file wins over it.
        sha256: of the archive that the file came from; ``None``: it is the file's own.

    Raises:
        ExportError: not a GGUF file, a damaged or hostile one, or a model or tokenizer that is not supported.
    """

    def __init__(self, path: Path, *, uri: str, licence: str | None = None, sha256: str | None = None) -> None:
        self._path = path
        self.uri = uri
        header = read_header(path)
        architecture = gguf_config.architecture_of(header, file=path.name)
        factors = {name: _vector(path, header, name) for name in gguf_config.ROPE_FACTORS if name in header.tensors}
        self.config: dict[str, Any] = gguf_config.build_config(header, factors, file=path.name)
        self._tensors = _name_tensors(path, header, architecture, self.config)
        self._texts = build_texts(header.metadata, file=path.name)
        stated = header.metadata.get("general.license")
        self.licence = stated if isinstance(stated, str) and stated else licence
        name = header.metadata.get("general.name")
        self.display_name = name if isinstance(name, str) and name else None
        self.sha256: str | None = sha256 or file_sha256(path)

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ExportError(f"the checkpoint has no tensor {name}", file=self._path.name) from None

    def texts(self) -> dict[str, bytes]:
        return dict(self._texts)


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _vector(path: Path, header: GgufHeader, name: str) -> list[float]:
    info = header.tensors[name]
    if len(info.shape) != 1 or info.shape[0] > 1 << 16:
        raise ExportError(f"should be a short vector, is {info.shape}", file=path.name, field=name)
    values: list[float] = GgufTensor(path, info, name).read().tolist()
    return values


def _name_tensors(
    path: Path, header: GgufHeader, architecture: GgufArchitecture, config: dict[str, Any]
) -> dict[str, GgufTensor]:
    """All weights by Hugging Face's name.

    Raises:
        ExportError: a tensor that this architecture does not have: leaving it out would make another model.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for info in header.tensors.values():
        if info.name in gguf_config.ROPE_FACTORS:
            continue
        layer = _LAYER.fullmatch(info.name)
        if layer is None:
            part, hf_name = "", _GLOBAL_NAMES.get(info.name)
        else:
            part = layer[2]
            hf_part = architecture.hf_layer_name(part)
            hf_name = hf_part and f"model.layers.{layer[1]}.{hf_part}.{layer[3]}"
        if hf_name is None:
            raise ExportError(
                f"is not a part of {architecture.class_name} as this exporter knows it", file=path.name, field=info.name
            )
        num_heads = heads.get(part, 0) if architecture.is_permuted else 0
        if num_heads and info.shape[0] % (2 * num_heads):
            raise ExportError(f"{info.shape} does not divide into {num_heads} heads", file=path.name, field=info.name)
        offset = architecture.norm_offset if hf_name.endswith("norm.weight") else 0.0
        tensors[hf_name] = GgufTensor(path, info, hf_name, num_heads, offset)
    return tensors
