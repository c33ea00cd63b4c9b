"""Tokenizers of tiny Whisper models: every byte is a token, and the tokens that steer the decoder lie behind them."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

END_ID = 256


def write_tokenizer(
    folder: Path,
    *,
    languages: Sequence[str] = ("en", "de", "haw"),
    no_speech: str = "<|nospeech|>",
    num_timestamps: int = 4,
    left_out: str = "",
) -> dict[str, int]:
    """Write tokenizer.json, with the steering tokens in the order of the published ones.

    Returns:
        Ids of the steering tokens by name. The model needs ``END_ID + len(ids)`` tokens at least.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{language}|>" for language in languages)]
    names += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", no_speech, "<|notimestamps|>"]
    names += [f"<|{0.02 * i:.2f}|>" for i in range(num_timestamps)]
    tokenizer.add_special_tokens([name for name in names if name != left_out])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {name: tokenizer.token_to_id(name) for name in names if name != left_out}
