"""A folder in Hugging Face's layout: config.json, one or several safetensors files, tokenizer and card."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from sardonyx_export.errors import ExportError
from sardonyx_export.sources import texts
from sardonyx_export.sources.safetensors_file import SafetensorsTensor, read_header

_MAX_INDEX_BYTES = 64 << 20
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class SafetensorsFolder:
    """A `checkpoint.Checkpoint` over a folder. Headers are read at once, weights when asked for.

    Args:
        folder: on disk, readable while the export runs.
        uri: what the manifest names as source.
        licence: where the caller knows it from elsewhere (an archive's metadata); a model card wins over it.
        sha256: of the archive that the folder came from.

    Raises:
        ExportError: not such a folder, a damaged or hostile file in it, or a kind of checkpoint that is not supported.
    """

    def __init__(self, folder: Path, *, uri: str, licence: str | None = None, sha256: str | None = None) -> None:
        self._folder = folder.resolve()
        self._root = texts.trusted_root(folder)
        self.uri = uri
        self.sha256 = sha256
        self.config = self._read_config()
        self._texts = self._read_texts()
        card = texts.read_optional(self._root, self._folder / "README.md")
        self.licence = (texts.card_licence(card) if card else None) or licence
        self._tensors = self._read_headers()

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def tensor(self, name: str) -> SafetensorsTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise ExportError(f"the checkpoint has no tensor {name}") from None

    def texts(self) -> dict[str, bytes]:
        return dict(self._texts)

    def _read_config(self) -> dict[str, Any]:
        config = texts.parse_object(texts.read_bytes(self._root, self._folder / "config.json"), file="config.json")
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
            raise ExportError("names no architecture", file="config.json", field="architectures")
        quantization = config.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
            raise ExportError(
                f"weights are already quantised ({method}); export from the original weights or from a GGUF file",
                file="config.json",
                field="quantization_config",
            )
        return config

    def _read_texts(self) -> dict[str, bytes]:
        tokenizer = texts.read_optional(
            self._root, self._folder / "tokenizer.json", max_bytes=texts.MAX_TOKENIZER_BYTES
        )
        if tokenizer is None:
            if (self._folder / "tokenizer.model").exists():
                raise ExportError(
                    "has a SentencePiece tokenizer.model only; save its fast tokenizer, which writes a tokenizer.json",
                    file=self._folder.name,
                )
            raise ExportError("is missing; nothing else says how text becomes tokens", file="tokenizer.json")
        found = {"tokenizer.json": tokenizer}
        for name in ("tokenizer_config.json", "generation_config.json"):
            data = texts.read_optional(self._root, self._folder / name)
            if data is not None:
                found[name] = data
        template = self._chat_template(found)
        if template is not None:
            found["chat_template.jinja"] = template
        return found

    def _chat_template(self, found: dict[str, bytes]) -> bytes | None:
        """The template from its own file, or from either JSON file in which older checkpoints keep it."""
        data = texts.read_optional(self._root, self._folder / "chat_template.jinja")
        if data is not None:
            return data
        legacy = texts.read_optional(self._root, self._folder / "chat_template.json")
        for name, source in (
            ("chat_template.json", legacy),
            ("tokenizer_config.json", found.get("tokenizer_config.json")),
        ):
            template = texts.parse_object(source, file=name).get("chat_template") if source is not None else None
            if isinstance(template, list):
                named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
                template = named.get("default")
            if isinstance(template, str):
                return template.encode()
        return None

    def _read_headers(self) -> dict[str, SafetensorsTensor]:
        index_path = self._folder / _INDEX
        if not index_path.exists():
            return read_header(texts.inside(self._root, self._single_file()))
        data = texts.read_bytes(self._root, index_path, max_bytes=_MAX_INDEX_BYTES)
        try:
            weight_map = msgspec.json.decode(data, type=_Index).weight_map
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ExportError(f"is not a weight map: {error}", file=_INDEX) from error
        shards: dict[str, dict[str, SafetensorsTensor]] = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise ExportError(f"{shard!r} is not the name of a safetensors file", file=_INDEX, field="weight_map")
            shards[shard] = read_header(texts.inside(self._root, self._folder / shard))
        tensors = {}
        for name, shard in weight_map.items():
            if name not in shards[shard]:
                raise ExportError(f"{shard} does not hold it", file=_INDEX, field=name)
            tensors[name] = shards[shard][name]
        return tensors

    def _single_file(self) -> Path:
        if (self._folder / _SINGLE).exists():
            return self._folder / _SINGLE
        found = sorted(self._folder.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        other = next(iter(sorted([*self._folder.glob("*.bin"), *self._folder.glob("*.pt")])), None)
        if not found and other is not None:
            raise ExportError(
                "holds pickled weights only, which are never opened; convert them to safetensors first", file=other.name
            )
        raise ExportError(f"expected {_SINGLE} or {_INDEX}", file=self._folder.name)
