import hashlib

import numpy as np
import pytest
from tests.tiny_models import SPECIAL_TOKENS, TinyDecoder, make_language_model

from sardonyx.core import RunnerLimits
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.repository import manifest
from sardonyx.repository.check import check_repository
from sardonyx.runners.decoder import DecoderRunner, ForwardRow
from sardonyx.runtime.session import open_session


def greedy_ids(runner, prompt, count):
    ids, past = list(prompt), 0
    while len(ids) < len(prompt) + count:
        new = ids[past:]
        logits = runner.forward([ForwardRow(0, new, past)], [len(new) - 1])
        past = len(ids)
        ids.append(int(logits[0].argmax()))
    return ids[len(prompt) :]


def test_repository_check_finds_nothing(tmp_path):
    make_language_model(tmp_path, "tiny", parameters={"max_num_seqs": "4"})
    make_language_model(tmp_path, "other", add_bos_token=True, chat_template=None)
    assert check_repository(tmp_path) == []


def test_same_arguments_give_the_same_files(tmp_path):
    first = make_language_model(tmp_path / "a")
    second = make_language_model(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (
            hashlib.sha256((first / name).read_bytes()).digest()
            == hashlib.sha256((second / name).read_bytes()).digest()
        )


def test_vocabulary_of_the_graph_is_the_tokenizers(tmp_path):
    folder = make_language_model(tmp_path)
    model = manifest.parse((folder / "manifest.json").read_bytes()).llm
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == model.vocab_size
    text = "the cat is not, with 17 ünïcödé \N{ROCKET} bytes"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.token_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))


@pytest.mark.parametrize("sizes", [TinyDecoder(), TinyDecoder(num_layers=3, num_heads=6, num_kv_heads=3, seed=5)])
def test_greedy_texts_differ_with_the_prompt_and_run_on(tmp_path, sizes):
    folder = make_language_model(tmp_path, sizes=sizes)
    model = manifest.parse((folder / "manifest.json").read_bytes()).llm
    limits = RunnerLimits(1, model.max_model_len, model.max_model_len, model.vocab_size)
    runner = DecoderRunner(open_session(folder / "model.onnx", model_name="tiny"), model, limits)
    tokenizer = Tokenizer.load(folder)
    prompts = ["Hello", "Hello!", "What is the capital of France?", "the", "one two three", "1 + 1 ="]
    texts = [greedy_ids(runner, tokenizer.encode(prompt), 40) for prompt in prompts]
    assert len({tuple(text) for text in texts}) == len(prompts)
    assert all(len(set(text)) > 5 for text in texts)
    assert np.isin(texts, model.eos_token_ids).mean() < 0.05
