"""Exports of tiny encoders, rerankers and classifiers through the whole pipeline."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.export.encoder_checkpoints import HIDDEN_SIZE, MAX_MODEL_LEN, make_encoder, write_tokenizer

from sardonyx.repository.check import check_repository
from sardonyx.repository.encoder_config import encoder_options
from sardonyx.repository.layout import Repository
from sardonyx_export.errors import ExportError
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest, ExportResult, find_existing


def export(source: Path, root: Path, **options: Any) -> ExportResult:
    request = ExportRequest(source=str(source), repository=root, **options)
    return run_export(request, progress=lambda *_: None, announce=lambda _: None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.mark.parametrize("architecture", ["BertModel", "XLMRobertaModel", "ModernBertModel", "MPNetForMaskedLM"])
def test_bare_encoder_becomes_an_embedding_model(tmp_path, root, architecture):
    make_encoder(tmp_path / "Tiny", architecture)
    result = export(tmp_path / "Tiny", root)
    manifest = result.manifest
    assert (result.name, manifest.family, manifest.precision) == ("tiny", "embeddings", "fp32")
    assert manifest.encoder is not None
    assert (manifest.encoder.layout, manifest.encoder.width) == ("packed", HIDDEN_SIZE)
    assert manifest.encoder.max_model_len == MAX_MODEL_LEN
    assert manifest.embeddings is not None
    assert manifest.embeddings.pooling == "mean"
    assert check_repository(root) == []


def test_parity_is_stated_for_three_shapes_with_the_library_itself(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    parity = export(tmp_path / "tiny", root).manifest.parity
    own = [each for each in parity if each.reference.startswith("numpy")]
    library = [each for each in parity if each.reference.startswith("sentence-transformers")]
    assert (len(own), len(library)) == (3, 3)
    assert all(each.min_cosine is not None and each.min_cosine >= 0.9999 for each in parity)


def test_int8_keeps_the_directions(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    manifest = export(tmp_path / "tiny", root, precision="int8").manifest
    assert (manifest.precision, manifest.activations) == ("int8", "int8_rows")
    assert all(each.min_cosine is not None and 0.99 <= each.min_cosine < 1 for each in manifest.parity)


def test_one_label_makes_a_reranker_and_several_a_classifier(tmp_path, root):
    make_encoder(tmp_path / "one", "BertForSequenceClassification", num_labels=1)
    make_encoder(tmp_path / "three", "DistilBertForSequenceClassification", num_labels=3)
    reranker, classifier = export(tmp_path / "one", root).manifest, export(tmp_path / "three", root).manifest
    assert (reranker.family, classifier.family) == ("reranker", "classifier")
    assert reranker.labels is not None
    assert reranker.labels.activation == "sigmoid"
    assert classifier.labels is not None
    assert classifier.labels.names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert any(each.reference.startswith("transformers") for each in classifier.parity)


def test_classifiers_base_may_be_exported_for_embeddings(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertForSequenceClassification", num_labels=3)
    assert export(tmp_path / "tiny", root, task="embeddings", pooling="cls").manifest.family == "embeddings"


def test_tokeniser_neither_cuts_nor_pads(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    path = tmp_path / "tiny" / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(facts))
    written = json.loads((export(tmp_path / "tiny", root).path / "tokenizer.json").read_text())
    assert written["truncation"] is None
    assert written["padding"] is None


def test_fewer_tokens_may_be_asked_for(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    encoder = export(tmp_path / "tiny", root, max_model_len=16).manifest.encoder
    assert encoder is not None
    assert encoder.max_model_len == 16


def test_written_config_is_one_that_the_server_reads(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    export(tmp_path / "tiny", root)
    options = encoder_options(Repository(root).entry("tiny").config)
    assert options.max_batch_tokens is None
    config = root / "tiny" / "config.pbtxt"
    config.write_text(config.read_text().replace("# parameters", "parameters"))
    options = encoder_options(Repository(root).entry("tiny").config)
    assert (options.max_batch_tokens, options.truncate, options.allow_any_dimensions) == (1024, True, True)


def test_the_same_export_is_found_and_another_is_not(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    export(tmp_path / "tiny", root)
    asked = ExportRequest(source=str(tmp_path / "tiny"), repository=root)
    assert find_existing(asked) is not None
    for change in ({"task": "reranker"}, {"pooling": "cls"}, {"precision": "int8"}, {"max_model_len": 16}):
        other = ExportRequest(source=str(tmp_path / "tiny"), repository=root, **change)  # type: ignore[arg-type]
        assert find_existing(other) is None


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("BertModel", {"precision": "int4"}, "--precision: int4 is for language models"),
        ("BertModel", {"activations": "int8"}, "--activations: follow from the precision"),
        ("BertModel", {"max_model_len": 1000}, "max_model_len"),
        ("BertModel", {"task": "image-classifier"}, "--task"),
        ("BertForSequenceClassification", {"pooling": "cls"}, "--pooling: is for embeddings"),
        (
            "BertModel",
            {"kv_cache_dtype": "int8"},
            "--kv-cache-dtype: is for language models; this is exported as embed",
        ),
        ("BertForSequenceClassification", {"task": "reranker"}, "a reranker has one label"),
    ],
)
def test_options_that_do_not_suit_are_refused_by_name(tmp_path, root, architecture, options, message):
    make_encoder(tmp_path / "tiny", architecture)
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "tiny", root, **options)
    assert not any(path.name == "tiny" for path in root.glob("*"))


def test_tokeniser_that_does_not_fit_is_refused_and_nothing_published(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel", vocab_size=8)
    write_tokenizer(tmp_path / "tiny", "BertModel")
    with pytest.raises(ExportError, match=r"tokenizer\.json: gives token \d+; the model has 8"):
        export(tmp_path / "tiny", root)
    assert not (root / "tiny").exists()


def test_encoder_for_cuda_says_so_and_how_it_was_verified(tmp_path, root):
    make_encoder(tmp_path / "tiny", "BertModel")
    manifest = export(tmp_path / "tiny", root, target="cuda").manifest
    assert (manifest.target, manifest.precision, manifest.activations) == ("cuda", "fp16", "fp16")
    assert len(manifest.parity) == 6
    assert all(each.reference.startswith("in numpy, not on CUDA: ") for each in manifest.parity)
    assert all(each.min_cosine is not None and each.min_cosine >= 0.999 for each in manifest.parity)
    asked = {"source": str(tmp_path / "tiny"), "repository": root}
    assert find_existing(ExportRequest(**asked, target="cuda")) is not None
    assert find_existing(ExportRequest(**asked)) is None
    assert check_repository(root) == []


def test_classifier_for_cuda_may_be_bf16(tmp_path, root):
    make_encoder(tmp_path / "tiny", "ModernBertForSequenceClassification", num_labels=3)
    manifest = export(tmp_path / "tiny", root, target="cuda", precision="bf16").manifest
    assert (manifest.target, manifest.activations) == ("cuda", "bf16")
    assert all(each.max_abs_error <= 5e-2 for each in manifest.parity)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cuda", "precision": "int8"}, "--precision: int8 is for the CPU; encoders for cuda are fp16 or"),
        ({"target": "cuda", "precision": "fp32"}, "--precision: fp32 is for the CPU"),
        ({"precision": "fp16"}, "--precision: fp16 is for --target cuda"),
        ({"target": "cuda", "activations": "fp32"}, "--activations: follow from the precision"),
    ],
)
def test_precisions_that_do_not_suit_the_target_are_refused(tmp_path, root, options, message):
    make_encoder(tmp_path / "tiny", "BertModel")
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "tiny", root, **options)
