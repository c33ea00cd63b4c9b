"""What makes a built graph a version: its texts beside it, and the manifest that vouches for every file."""

import datetime
import importlib.metadata
from pathlib import Path

from sardonyx.repository import manifest
from sardonyx.repository.manifest import Graph, GraphFile, LanguageModel, Manifest, Parity, Source
from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.plan import Activations, Plan
from sardonyx_export.sources.gguf_file import file_sha256

_TOOLS = ("sardonyx", "onnx", "onnxruntime", "gguf", "numpy", "tokenizers")

_CONFIG = """\
# Export wrote this file once and leaves it alone from now on: it is yours to edit.
name: "{name}"
backend: "onnxruntime"

# What is not set here comes from the server's settings of the same name.
# parameters {{ key: "max_num_seqs" value {{ string_value: "32" }} }}
# parameters {{ key: "max_model_len" value {{ string_value: "{max_model_len}" }} }}
# parameters {{ key: "kv_cache_bytes" value {{ string_value: "1GiB" }} }}
"""


def write_version(
    folder: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    revision: str | None,
    graphs: dict[str, list[str]],
    weights: str,
    activations: Activations,
    llm: LanguageModel,
    parity: list[Parity],
) -> Manifest:
    """Complete a version folder that already holds its graphs. The manifest is written last.

    Args:
        folder: where the graphs are.
        checkpoint: gives texts and origin.
        plan: what was built.
        revision: the hub's commit, where the source has one.
        graphs: file names by role, the model first, then its data files.
        weights: what became of the stored weights, in words.
        activations: what became of activations.
        llm: limits, cache layout and special tokens.
        parity: what verification measured.
    """
    texts = checkpoint.texts()
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    described = Manifest(
        family="llm",
        precision=plan.precision,
        activations=activations,
        target=plan.target,
        graphs={
            role: Graph(model=_describe(folder / files[0]), data=[_describe(folder / file) for file in files[1:]])
            for role, files in graphs.items()
        },
        files=[_describe(folder / name) for name in sorted(texts)],
        source=Source(
            uri=checkpoint.uri,
            revision=revision,
            architecture=plan.architecture,
            licence=checkpoint.licence,
            sha256=checkpoint.sha256,
            weights=weights,
        ),
        llm=llm,
        parity=parity,
        tools=_tool_versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(described))
    return described


def config_text(plan: Plan) -> str:
    """config.pbtxt for a model that has none yet."""
    return _CONFIG.format(name=plan.name, max_model_len=plan.max_model_len)


def _describe(path: Path) -> GraphFile:
    return GraphFile(path=path.name, sha256=file_sha256(path), size_bytes=path.stat().st_size)


def _tool_versions() -> dict[str, str]:
    """Of the packages that had a hand in it. ONNX Runtime comes under another name with a GPU build."""
    versions = {}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
