"""What makes a built graph a version: its texts beside it, and the manifest that vouches for every file."""

import datetime
import importlib.metadata
from pathlib import Path

from sardonyx.repository import manifest
from sardonyx.repository.manifest import Graph, GraphFile, Manifest, Source
from sardonyx_export.built import Built
from sardonyx_export.plan import Plan
from sardonyx_export.sources.gguf_file import file_sha256
from sardonyx_export.sources.resolve import OpenSource

_TOOLS = (
    "sardonyx",
    "onnx",
    "onnxruntime",
    "gguf",
    "numpy",
    "tokenizers",
    "scikit-learn",
    "torch",
    "transformers",
    "diffusers",
)

_HEADER = """\
# Export wrote this file once and leaves it alone from now on: it is yours to edit.
name: "{name}"
backend: "onnxruntime"

# What is not set here comes from the server's settings, or from the graph.
"""
_LANGUAGE_MODEL = """\
# parameters {{ key: "max_num_seqs" value {{ string_value: "32" }} }}
# parameters {{ key: "max_model_len" value {{ string_value: "{max_model_len}" }} }}
# parameters {{ key: "kv_cache_bytes" value {{ string_value: "1GiB" }} }}
"""
_ENCODER = """\
# parameters {{ key: "max_batch_tokens" value {{ string_value: "1024" }} }}
# parameters {{ key: "max_model_len" value {{ string_value: "{max_model_len}" }} }}
# parameters {{ key: "truncate" value {{ string_value: "true" }} }}
"""
_EMBEDDINGS = """\
# parameters { key: "allow_any_dimensions" value { string_value: "true" } }
"""
_IMAGES = """\
# parameters { key: "max_batch_size" value { string_value: "8" } }
"""
_SPEECH = """\
# parameters { key: "max_num_seqs" value { string_value: "16" } }
# parameters { key: "max_batch_windows" value { string_value: "4" } }
# parameters { key: "kv_cache_bytes" value { string_value: "1GiB" } }
"""
_DIFFUSION = """\
# parameters { key: "max_num_seqs" value { string_value: "8" } }
# parameters { key: "max_batch_rows" value { string_value: "8" } }
# parameters { key: "max_steps" value { string_value: "50" } }
"""
_MODERATION = """\
# What a label says about the categories of /v1/moderations, with the score from which each is flagged:
# parameters { key: "moderation.LABEL" value { string_value: "harassment 0.5, hate 0.8" } }
"""


def write_version(folder: Path, opened: OpenSource, plan: Plan, built: Built) -> Manifest:
    """Complete a version folder that already holds its graphs. The manifest is written last.

    Args:
        folder: where the graphs are.
        opened: the source, for its origin.
        plan: what was to be built.
        built: what was.
    """
    for name, content in built.texts.items():
        (folder / name).write_bytes(content)
    described = Manifest(
        family=built.family,
        precision=built.precision,
        activations=built.activations,
        target=plan.target,
        graphs={
            role: Graph(model=_describe(folder / files[0]), data=[_describe(folder / file) for file in files[1:]])
            for role, files in built.graphs.items()
        },
        files=[_describe(folder / name) for name in sorted(built.texts)],
        source=Source(
            uri=opened.uri,
            revision=opened.revision,
            architecture=built.architecture,
            licence=opened.licence,
            sha256=opened.sha256,
            weights=built.weights,
        ),
        llm=built.llm,
        encoder=built.encoder,
        embeddings=built.embeddings,
        labels=built.labels,
        image=built.image,
        whisper=built.whisper,
        diffusion=built.diffusion,
        parity=built.parity,
        tools=_tool_versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(described))
    return described


def config_text(plan: Plan, built: Built) -> str:
    """config.pbtxt for a model that has none yet."""
    text = _HEADER.format(name=plan.name)
    if built.llm is not None:
        text += _LANGUAGE_MODEL.format(max_model_len=built.llm.max_model_len)
    elif built.encoder is not None:
        text += _ENCODER.format(max_model_len=built.encoder.max_model_len)
    elif built.whisper is not None:
        text += _SPEECH
    elif built.diffusion is not None:
        text += _DIFFUSION
    else:
        text += _IMAGES
    text += _EMBEDDINGS if built.family == "embeddings" else ""
    text += _MODERATION if built.family in {"classifier", "image_classifier"} else ""
    for key, value in built.config_parameters.items():
        text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
    return text


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
