"""What a caller who loads a model brings along: a config, and with it perhaps all of the model's files.

Floor 4. Both come over the network. A config is parsed and every path is matched before anything is written or changed.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError, InvalidRequest
from sardonyx.repository.config import FILE_NAME, parse_override
from sardonyx.repository.ensemble import part_names
from sardonyx.repository.layout import ModelEntry, Repository, validate_model_name
from sardonyx.serving.served import ModelOverride
from sardonyx.serving.status import safe_reason

FOLDER_PREFIX = "sardonyx-load-"
MAX_FILES = 256
_FILE_PATH = re.compile(r"[1-9][0-9]{0,17}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}){1,4}|[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def check_override(name: str, override: ModelOverride) -> ModelOverride:
    """The same, with the models that its config names. Blocks for a moment.

    Raises:
        InvalidRequest: the config is wrong in itself, there are too many files, or a path is not plain: a version and
            file names, or one file name.
    """
    try:
        validate_model_name(name)
        config = parse_override(override.config, name=name)
    except ConfigError as error:
        raise InvalidRequest(safe_reason(error), param="config") from error
    if len(override.files) > MAX_FILES:
        raise InvalidRequest(f"at most {MAX_FILES} files can be brought along, not {len(override.files)}")
    for path in override.files:
        if not _FILE_PATH.fullmatch(path):
            raise InvalidRequest(f"Invalid file parameter '{path[:160]}' must stay within model directory.")
        if path == FILE_NAME:
            raise InvalidRequest("the config comes as a parameter of its own, not as a file", param=FILE_NAME)
    return msgspec.structs.replace(override, depends_on=part_names(config))


def override_config(name: str, override: ModelOverride) -> ModelConfig:
    """Of a checked one."""
    return parse_override(override.config, name=name)


@contextmanager
def override_folder(name: str, override: ModelOverride) -> Iterator[ModelEntry]:
    """A model that consists of what a checked override brought, in a folder that is there while the block runs.

    Raises:
        ConfigError: a file cannot be written.
    """
    root = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))
    try:
        folder = root / name
        folder.mkdir()
        for path, data in sorted(override.files.items()):
            _write(folder, path, data)
        _write(folder, FILE_NAME, text_format.MessageToString(override_config(name, override)).encode())
        yield Repository(root).entry(name)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _write(folder: Path, path: str, data: bytes) -> None:
    target = folder / path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=path) from error
