"""Exports of a tiny Whisper through the whole pipeline, from each layout that is read."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.export.sources.ctranslate2_writer import variables_of, write_model
from tests.export.whisper_checkpoints import make_whisper
from tests.export.whisper_tokenizers import END_ID, write_tokenizer

from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository
from sardonyx_export.errors import ExportError
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest, ExportResult, find_existing

VOCAB_SIZE = 288


def export(source: Path, root: Path, **options: Any) -> ExportResult:
    request = ExportRequest(source=str(source), repository=root, **options)
    return run_export(request, progress=lambda *_: None, announce=lambda _: None)


def make_source(folder: Path, *, generation: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A checkpoint with a tokenizer that fits it."""
    model = make_whisper(folder, vocab_size=VOCAB_SIZE, **changes)
    write_tokenizer(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return model


def make_converted(folder: Path) -> None:
    """The same in CTranslate2's layout."""
    model = make_source(folder / "original")
    write_model(folder / "model.bin", variables_of(model), {"decoder/projection/weight": "decoder/embeddings/weight"})
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"alignment_heads": [[1, 0]], "suppress_ids": [3]}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_a_folder_becomes_a_model_that_the_server_can_check(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "Tiny", generation={"alignment_heads": [[2, 1], [0, 0]]})
    result = export(tmp_path / "Tiny", root)
    manifest = result.manifest
    assert (result.name, manifest.family, manifest.precision, manifest.activations) == (
        "tiny",
        "whisper",
        "fp32",
        "fp32",
    )
    assert sorted(manifest.graphs) == ["aligner", "decoder", "encoder"]
    assert sorted(file.path for file in manifest.files) == ["generation_config.json", "tokenizer.json"]
    assert manifest.whisper is not None
    assert manifest.whisper.alignment_heads == [[2, 1], [0, 0]]
    assert manifest.whisper.end_id == END_ID
    assert Tokenizer(result.path).vocab_size <= VOCAB_SIZE
    assert check_repository(root) == []


def test_parity_is_stated_for_every_graph_with_numpy_and_with_the_library(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "tiny")
    parity = export(tmp_path / "tiny", root).manifest.parity
    own = [each.reference.rpartition(", ")[2] for each in parity if each.reference.startswith("numpy")]
    assert own == [
        "keys and values of 2 windows",
        "logits of 2 texts",
        "attention of the aligner",
        "log-probabilities of the aligner",
    ]
    assert sum(each.reference.startswith("transformers") for each in parity) == 2
    assert all(each.mean_kl is None or each.mean_kl < 1e-6 for each in parity)


def test_int8_is_built_where_asked_for(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "tiny")
    manifest = export(tmp_path / "tiny", root, precision="int8").manifest
    assert (manifest.precision, manifest.activations) == ("int8", "int8_rows")
    assert "int8 per channel" in manifest.source.weights


@pytest.mark.parametrize(("precision", "datatype"), [("auto", "FP16"), ("bf16", "BF16")])
def test_for_cuda_it_is_built_in_16_bits_with_a_cache_in_blocks(
    tmp_path: Path, root: Path, precision: Any, datatype: str
) -> None:
    make_source(tmp_path / "tiny", generation={"alignment_heads": [[2, 1], [0, 0]]})
    manifest = export(tmp_path / "tiny", root, target="cuda", precision=precision).manifest
    chosen = datatype.lower()
    assert (manifest.target, manifest.precision, manifest.activations) == ("cuda", chosen, chosen)
    assert sorted(manifest.graphs) == ["aligner", "decoder", "encoder"]
    assert manifest.whisper is not None
    assert (manifest.whisper.kv.datatype, manifest.whisper.kv.block_size) == (datatype, 256)
    assert len(manifest.parity) == 6
    assert all(each.reference.startswith("in numpy, not on CUDA: ") for each in manifest.parity)
    assert check_repository(root) == []
    asked = ExportRequest(source=str(tmp_path / "tiny"), repository=root)
    assert find_existing(asked) is None
    assert find_existing(msgspec.structs.replace(asked, target="cuda")) is not None


def test_shards_are_one_model(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "tiny").save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    write_tokenizer(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert export(tmp_path / "shards", root).manifest.family == "whisper"


def test_ctranslate2s_layout_is_told_by_its_file(tmp_path: Path, root: Path) -> None:
    make_converted(tmp_path / "converted")
    manifest = export(tmp_path / "converted", root).manifest
    assert manifest.whisper is not None
    assert manifest.whisper.alignment_heads == [[1, 0]]
    assert manifest.whisper.suppress_ids[0] == 3
    assert manifest.source.weights.startswith("encoder: F16 -> fp32")


def test_other_models_of_ctranslate2_are_refused(tmp_path: Path, root: Path) -> None:
    make_converted(tmp_path / "converted")
    write_model(tmp_path / "converted" / "model.bin", {}, specification="TransformerSpec")
    with pytest.raises(ExportError, match="'TransformerSpec'; Whisper is read from this format"):
        export(tmp_path / "converted", root)


def test_a_model_without_alignment_heads_has_no_aligner(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "tiny", generation={"alignment_heads": []})
    manifest = export(tmp_path / "tiny", root).manifest
    assert sorted(manifest.graphs) == ["decoder", "encoder"]
    assert not any("aligner" in each.reference for each in manifest.parity)


def test_the_same_export_is_found_and_another_is_not(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "tiny")
    export(tmp_path / "tiny", root, task="transcription")
    asked = ExportRequest(source=str(tmp_path / "tiny"), repository=root)
    for same in ({}, {"task": "transcription"}, {"precision": "fp32"}):
        assert find_existing(msgspec.structs.replace(asked, **same)) is not None
    for other in ({"task": "embeddings"}, {"precision": "int8"}):
        assert find_existing(msgspec.structs.replace(asked, **other)) is None


def test_written_config_names_parameters_that_the_server_reads(tmp_path: Path, root: Path) -> None:
    from sardonyx.repository.speech_config import speech_model_options

    make_source(tmp_path / "tiny")
    export(tmp_path / "tiny", root)
    config = root / "tiny" / "config.pbtxt"
    assert speech_model_options(Repository(root).entry("tiny").config).max_num_seqs is None
    config.write_text(config.read_text().replace("# parameters", "parameters"))
    options = speech_model_options(Repository(root).entry("tiny").config)
    assert (options.max_num_seqs, options.max_batch_windows, options.kv_cache_bytes) == (16, 4, 1 << 30)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, "--precision: int4 is for language models; speech models are built in fp32 or int8"),
        ({"precision": "int8", "target": "cuda"}, "--precision: int8 is for the CPU; speech models for cuda are fp16"),
        ({"precision": "fp16"}, "--precision: fp16 is for --target cuda"),
        ({"activations": "int8"}, "--activations: follow from the precision"),
        ({"max_model_len": 12}, "--max-model-len: follows from the windows"),
        ({"pooling": "cls"}, "--pooling: is for embeddings"),
        ({"task": "text-generation"}, "--task: is text-generation; the source is of the task transcription"),
    ],
)
def test_options_that_do_not_suit_are_refused_by_name(
    tmp_path: Path, root: Path, options: dict[str, Any], said: str
) -> None:
    make_source(tmp_path / "tiny")
    with pytest.raises(ExportError, match=said):
        export(tmp_path / "tiny", root, **options)
    assert not (root / "tiny").exists()


def test_a_checkpoint_without_a_steering_token_is_refused_and_nothing_published(tmp_path: Path, root: Path) -> None:
    make_source(tmp_path / "tiny")
    write_tokenizer(tmp_path / "tiny", left_out="<|startofprev|>")
    with pytest.raises(ExportError, match="startofprev"):
        export(tmp_path / "tiny", root)
    assert not (root / "tiny").exists()
