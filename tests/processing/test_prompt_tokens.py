import pytest
from tests.tiny_diffusion import MAX_TOKENS, make_tokenizer

from sardonyx.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from sardonyx.processing.prompt_tokens import PromptTokenizer

PAD_ID = 7


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    tokenizer = make_tokenizer()
    # As publishers leave it in the file; the manifest decides instead.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=9, pad_id=1)
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module")
def tokens(path):
    return PromptTokenizer(path, MAX_TOKENS, PAD_ID)


def test_prompt_is_filled_up(tokens):
    ids, num_tokens = tokens.encode("a cat", param="prompt")
    expected = make_tokenizer().encode("a cat").ids
    assert num_tokens == len(expected) == 7
    assert ids == expected + [PAD_ID] * (MAX_TOKENS - 7)


def test_empty_prompt_has_its_ends_only(tokens):
    ids, num_tokens = tokens.encode("", param="prompt")
    assert num_tokens == 2
    assert len(ids) == MAX_TOKENS


def test_prompt_may_be_as_long_as_the_encoder_reads_and_no_longer(tokens):
    ids, num_tokens = tokens.encode("x" * (MAX_TOKENS - 2), param="prompt")
    assert num_tokens == len(ids) == MAX_TOKENS
    with pytest.raises(ContextLengthExceeded) as caught:
        tokens.encode("x" * (MAX_TOKENS - 1), param="negative_prompt")
    assert caught.value.param == "negative_prompt"
    assert "has 25 tokens; the model reads 24 tokens" in caught.value.message


def test_prompt_of_obviously_too_many_characters_is_not_tokenised(path):
    class Refusing:
        def encode(self, text):
            raise AssertionError("it was tokenised")

    tokens = PromptTokenizer(path, MAX_TOKENS, PAD_ID)
    tokens._backend = Refusing()
    with pytest.raises(ContextLengthExceeded, match="10,000 characters"):
        tokens.encode("x" * 10_000, param="prompt")


def test_half_a_surrogate_pair_is_refused(tokens):
    with pytest.raises(InvalidRequest, match="half a surrogate pair") as caught:
        tokens.encode("\ud83d", param="prompt")
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a tokenizer") as caught:
        PromptTokenizer(path, MAX_TOKENS, PAD_ID)
    assert caught.value.file == "tokenizer.json"
