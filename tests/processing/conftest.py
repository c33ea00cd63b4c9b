"""Version folders with small tokenizers of every kind that is served, trained here on a few sentences."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from sardonyx.processing.tokenizer import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It does not, he said.",
    "Le cœur a ses raisons que la raison ne connaît point; naïve façade, déjà vu.",
    "吾輩は猫である。名前はまだ無い。 Привет, мир! 🙂👍🏽 한국어",
    "def f(x):\n    return x + 1\n\n\tif x == 10:  # comment\n        print('user assistant system')\n",
    "The lazy dog sleeps. The fox runs over the brown field, and over, and over again.",
] * 4

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def byte_level() -> Backend:
    """As GPT-2, Llama 3, Qwen."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<think>", special=False), AddedToken("   ", special=False)])
    backend.add_tokens([AddedToken("é", special=False), AddedToken("<｜fim▁hole｜>", special=False)])
    return backend


def sentence_piece() -> Backend:
    """As Llama 2, Mistral, Phi-3: BPE over ▁ with byte fallback, a BOS and a space put before the text."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXT[:2], trainers.BpeTrainer(vocab_size=250, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {token: n for n, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ["<unk>", "<s>", "</s>", *SPECIAL]])
    return backend


def gemma_like() -> Backend:
    """SentencePiece without a space before the text."""
    backend = sentence_piece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def unigram() -> Backend:
    """As T5 and XLM-R; its special tokens are pieces of the model, too."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "</s>", *SPECIAL]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def word_piece() -> Backend:
    """As BERT."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TEXT, trainer)
    return backend


def word_level() -> Backend:
    """Whole words and no decoder."""
    words = sorted({word for line in TEXT for word in line.split()})
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


KINDS: dict[str, Callable[[], Backend]] = {
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
    "gemma_like": gemma_like,
    "unigram": unigram,
    "word_piece": word_piece,
    "word_level": word_level,
}


@pytest.fixture(scope="session")
def backends() -> dict[str, Backend]:
    """The library's own tokenizer of each kind: what ours is compared with."""
    return {kind: build() for kind, build in KINDS.items()}


@pytest.fixture(scope="session")
def folders(backends: dict[str, Backend], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A version folder of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, backend in backends.items():
        (root / kind).mkdir()
        backend.save(str(root / kind / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    (root / "byte_level" / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Fast"}))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (root / "sentence_piece" / "tokenizer_config.json").write_text(json.dumps(config))
    return {kind: root / kind for kind in backends}


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    """Ours, loaded from those folders."""
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}
