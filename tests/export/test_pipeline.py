"""Exports of tiny models, through the server's own session, into a repository."""

from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest
from tests.export.checkpoints import tiny_llama_metadata, tiny_llama_tensors, write_gguf, write_llama_folder

from sardonyx.errors import ConfigError
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository
from sardonyx_export.errors import ExportError
from sardonyx_export.kv_ranges import KvCacheDtype
from sardonyx_export.pipeline import run_export
from sardonyx_export.plan import Plan, Precision
from sardonyx_export.request import ExportRequest, ExportResult, find_existing
from sardonyx_export.stages import verify


def _export(request: ExportRequest) -> ExportResult:
    return run_export(request, progress=lambda *_: None, announce=lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama_folder(tmp_path / "Tiny-Llama", shards=2)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_folder_becomes_a_model_that_the_server_finds_sound(
    tmp_path: Path, folder: Path, precision: Precision
) -> None:
    root = tmp_path / "new" / "repository"
    result = _export(ExportRequest(source=str(folder), repository=root, precision=precision))
    assert (result.name, result.version, result.path) == ("tiny-llama", 1, root / "tiny-llama" / "1")
    assert check_repository(root) == []
    assert Repository(root).entry("tiny-llama").versions == [1]
    assert result.manifest.precision == precision
    assert result.manifest.parity[0].num_positions > 100
    assert result.manifest.llm is not None
    assert result.manifest.llm.eos_token_ids == [2]
    assert Tokenizer.load(result.path).encode("hello world")
    assert not list((root / ".staging").iterdir())


@pytest.mark.parametrize(
    ("qtype", "precision", "loss"),
    [
        (gguf.GGMLQuantizationType.Q4_0, "int4", 1e-6),
        (gguf.GGMLQuantizationType.Q4_1, "int4", 1e-6),
        (gguf.GGMLQuantizationType.Q8_0, "int8", 2e-3),
    ],
)
def test_the_blocks_of_a_gguf_file_are_kept(
    tmp_path: Path, qtype: gguf.GGMLQuantizationType, precision: str, loss: float
) -> None:
    tensors = tiny_llama_tensors()
    quantised = {name: qtype for name, value in tensors.items() if value.ndim == 2}
    quantised["token_embd.weight"] = gguf.GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "Tiny.Q4.gguf", metadata=tiny_llama_metadata(), tensors=tensors, quantised=quantised)
    result = _export(ExportRequest(source=str(path), repository=tmp_path / "repository"))
    assert result.manifest.precision == precision
    assert result.manifest.source.licence == "apache-2.0"
    assert result.manifest.source.sha256 is not None
    assert qtype.name in result.manifest.source.weights
    assert result.manifest.parity[0].mean_kl < loss


def test_the_context_can_be_shorter_than_the_models(tmp_path: Path, folder: Path) -> None:
    request = ExportRequest(source=str(folder), repository=tmp_path / "repository", max_model_len=8, precision="fp32")
    result = _export(request)
    assert result.manifest.llm is not None
    assert result.manifest.llm.max_model_len == 8
    with pytest.raises(ExportError, match="--max-model-len: is 257"):
        _export(msgspec.structs.replace(request, max_model_len=257, name="other"))


def test_a_name_that_is_taken_is_refused_unless_a_version_is_to_be_added(tmp_path: Path, folder: Path) -> None:
    request = ExportRequest(source=str(folder), repository=tmp_path / "repository", precision="fp32")
    _export(request)
    with pytest.raises(ExportError, match="tiny-llama is in the repository already"):
        _export(request)
    assert _export(msgspec.structs.replace(request, adds_version=True)).version == 2
    assert _export(msgspec.structs.replace(request, name="other")).version == 1


def test_a_broken_version_is_mended_by_the_next_one(tmp_path: Path, folder: Path) -> None:
    request = ExportRequest(source=str(folder), repository=tmp_path / "repository", precision="fp32")
    (_export(request).path / "model.onnx").unlink()
    assert _export(request).version == 2


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_a_model_for_cuda_is_verified_without_a_card(tmp_path: Path, folder: Path, precision: Precision) -> None:
    root = tmp_path / "repository"
    request = ExportRequest(source=str(folder), repository=root, precision=precision, target="cuda")
    result = _export(request)
    assert check_repository(root) == []
    manifest = result.manifest
    assert (manifest.target, manifest.precision) == ("cuda", precision)
    assert manifest.activations == ("bf16" if precision == "bf16" else "fp16")
    assert manifest.llm is not None
    assert manifest.llm.kv.block_size == 256
    assert manifest.llm.kv.datatype == manifest.activations.upper()
    assert {role: graph.model.path for role, graph in manifest.graphs.items()} == {
        "decoder": "model.onnx",
        "sampler": "sampler.onnx",
        "feed": "feed.onnx",
    }
    assert manifest.parity[0].num_positions > 100
    assert manifest.parity[0].reference.startswith("in numpy, not on CUDA: ")
    assert find_existing(request) is not None
    assert find_existing(msgspec.structs.replace(request, target="cpu")) is None
    assert find_existing(msgspec.structs.replace(request, kv_cache_dtype="int8")) is None


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("int8", "mean_kl <= 0.021, top1_agreement >= 0.807"), ("fp8", "mean_kl <= 0.081, top1_agreement >= 0.712")],
)
def test_a_quantised_cache_is_calibrated_verified_and_in_the_manifest(
    tmp_path: Path, folder: Path, dtype: KvCacheDtype, tolerance: str
) -> None:
    root = tmp_path / "repository"
    stages: list[str] = []
    request = ExportRequest(source=str(folder), repository=root, precision="fp16", target="cuda", kv_cache_dtype=dtype)
    manifest = run_export(request, progress=lambda stage, *_: stages.append(stage), announce=lambda _: None).manifest
    assert check_repository(root) == []
    assert "calibrate" in stages
    assert manifest.llm is not None
    assert manifest.llm.kv.datatype == dtype.upper()
    assert manifest.activations == "fp16"
    (parity,) = manifest.parity
    assert parity.reference.endswith(f"prompts; KV cache in {dtype}")
    assert parity.tolerance == tolerance
    assert parity.mean_kl is not None
    assert parity.mean_kl > 1e-5, "a cache that rounds leaves traces"
    assert find_existing(request) is not None
    assert find_existing(msgspec.structs.replace(request, kv_cache_dtype="fp8" if dtype == "int8" else "int8")) is None


def test_nothing_is_published_when_the_graph_is_out_of_tolerance(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = verify.Tolerance(max_relative_error=-1.0, mean_kl=-1.0, top1_agreement=2.0)
    monkeypatch.setitem(verify.TOLERANCES, "int8", impossible)
    root = tmp_path / "repository"
    with pytest.raises(ExportError, match="not what the source's weights say"):
        _export(ExportRequest(source=str(folder), repository=root))
    assert Repository(root).entries() == []
    assert not list((root / ".staging").iterdir())


def test_nothing_is_published_when_a_tensor_is_missing(tmp_path: Path) -> None:
    tensors = {name: value for name, value in tiny_llama_tensors().items() if name != "blk.1.ffn_up.weight"}
    path = write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tensors)
    root = tmp_path / "repository"
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        _export(ExportRequest(source=str(path), repository=root))
    assert Repository(root).entries() == []


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    tensors = tiny_llama_tensors()
    tensors["blk.0.ffn_up.weight"][3, 3] = np.nan
    path = write_gguf(tmp_path / "a.gguf", metadata=tiny_llama_metadata(), tensors=tensors)
    with pytest.raises((ExportError, ConfigError)):
        _export(ExportRequest(source=str(path), repository=tmp_path / "repository", precision="fp32"))
    assert Repository(tmp_path / "repository").entries() == []


def test_a_bad_name_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a model name"):
        _export(ExportRequest(source=str(tmp_path / "nothing"), repository=tmp_path / "repository", name="../x"))
    assert not (tmp_path / "repository").exists()


def test_progress_goes_up_to_its_end_and_the_plan_is_told_first(tmp_path: Path, folder: Path) -> None:
    told: list[object] = []
    run_export(
        ExportRequest(source=str(folder), repository=tmp_path / "repository"),
        progress=lambda *step: told.append(step),
        announce=told.append,
    )
    assert isinstance(told[0], Plan)
    for stage in ("build", "verify"):
        steps = [step for step in told[1:] if isinstance(step, tuple) and step[0] == stage]
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
        assert steps[-1][1] == steps[-1][2]
