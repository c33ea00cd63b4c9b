"""What tests do to version folders, and lines of their configs."""

import json
from pathlib import Path
from typing import Any


def change_manifest(folder: Path, **fields: Any) -> None:
    """Replace fields of the manifest; ``whisper__kv__head_size`` is one inside of others."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    for name, value in fields.items():
        *parents, last = name.split("__")
        inside = manifest
        for each in parents:
            inside = inside[each]
        inside[last] = value
    path.write_text(json.dumps(manifest))


def parameter(key: str, value: str) -> str:
    """A line of a config."""
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
