from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import msgspec
import pytest

from sardonyx.repository.families import KvLayout, LanguageModel
from sardonyx.repository.layout import Repository
from sardonyx.repository.manifest import FILE_NAME, Graph, GraphFile, Manifest, Source, encode


def listed(path: Path) -> GraphFile:
    """A manifest's entry for a file as it is."""
    data = path.read_bytes()
    return GraphFile(path=path.name, sha256=sha256(data).hexdigest(), size_bytes=len(data))


def fill_version(folder: Path, **changes: object) -> Manifest:
    """Write what an export of a language model writes, with bytes that are no graph."""
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "model.onnx.data").write_bytes(b"weights" * 100)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    graph = Graph(model=listed(folder / "model.onnx"), data=[listed(folder / "model.onnx.data")])
    manifest = Manifest(
        family="llm",
        precision="int4",
        graphs={"decoder": graph},
        files=[listed(folder / "tokenizer.json")],
        source=Source(uri="hf:org/tiny", architecture="LlamaForCausalLM"),
        llm=LanguageModel(vocab_size=64, max_model_len=128, kv=KvLayout(num_layers=1, num_kv_heads=1, head_size=8)),
        created="2026-11-23T00:00:00Z",
    )
    manifest = msgspec.structs.replace(manifest, **changes)
    (folder / FILE_NAME).write_bytes(encode(manifest))
    return manifest


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


@pytest.fixture
def publish(repository: Repository) -> Callable[..., Path]:
    """Publish a language model and get its version's folder."""

    def publish_one(name: str = "tiny", config_text: str | None = None) -> Path:
        with repository.staging(name) as staged:
            fill_version(staged)
            version = repository.publish(name, staged, config_text)
        return repository.root / name / str(version)

    return publish_one
