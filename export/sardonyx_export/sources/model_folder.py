"""Any file of a model's folder, by its path in it: read within limits, and never outside of the folder."""

from pathlib import Path, PurePosixPath
from typing import Any

from sardonyx_export.errors import ExportError
from sardonyx_export.sources import texts
from sardonyx_export.sources.safetensors_file import SafetensorsTensor, read_header


class ModelFolder:
    """A folder in Hugging Face's or sentence-transformers' layout.

    Args:
        folder: on disk, readable while the export runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._root = texts.trusted_root(folder)

    def has(self, path: str) -> bool:
        """There is something of that name. Links that lead nowhere count: reading them says so."""
        target = self._inside(path)
        return target.exists() or target.is_symlink()

    def read(self, path: str, *, max_bytes: int = texts.MAX_CONFIG_BYTES) -> bytes | None:
        """A whole small file; ``None`` where there is none. Raises ExportError as `texts.read_bytes`."""
        return texts.read_optional(self._root, self._inside(path), max_bytes=max_bytes)

    def object(self, path: str) -> dict[str, Any]:
        """A JSON object, empty where there is no such file. Raises ExportError for what is no object."""
        data = self.read(path)
        return {} if data is None else texts.parse_object(data, file=path)

    def tensors(self, path: str) -> dict[str, SafetensorsTensor]:
        """The tensors of a safetensors file by name.

        Raises:
            ExportError: it is missing, damaged, or outside of the folder.
        """
        return read_header(texts.inside(self._root, self._inside(path)))

    def _inside(self, path: str) -> Path:
        parts = PurePosixPath(path).parts
        if path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
            raise ExportError(f"{path!r:.200} is no path inside the model's folder")
        return self._folder.joinpath(*parts)
