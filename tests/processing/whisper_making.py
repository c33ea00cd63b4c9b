"""Small tokenizers with Whisper's special tokens."""

from pathlib import Path

from tests.processing.conftest import byte_level
from tokenizers import AddedToken

from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.processing.whisper_tokens import WhisperTokens
from sardonyx.repository.families import KvLayout, Whisper

LANGUAGES = ["en", "de", "ja"]
STEERING = ["startoftranscript", "translate", "transcribe", "startofprev", "nospeech", "notimestamps"]


def make_tokens(folder: Path, *, is_multilingual: bool) -> tuple[WhisperTokens, Whisper]:
    """A tokenizer that has names for special tokens and none for timestamps, as tiny.en's."""
    folder.mkdir()
    backend = byte_level()
    names = [f"<|{name}|>" for name in (STEERING + LANGUAGES if is_multilingual else STEERING)]
    backend.add_tokens([AddedToken(" (", special=False)])  # a token of its own, as in real vocabularies
    end_id = backend.get_vocab_size()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in ["<|endofall|>", *names]])
    backend.save(str(folder / "tokenizer.json"))
    ids = {name: backend.token_to_id(f"<|{name}|>") for name in STEERING}
    facts = Whisper(
        vocab_size=backend.get_vocab_size() + 1501,
        max_model_len=448,
        num_mels=80,
        num_frames=3000,
        kv=KvLayout(num_layers=1, num_kv_heads=1, head_size=8),
        start_id=ids["startoftranscript"],
        end_id=end_id,
        previous_id=ids["startofprev"],
        no_speech_id=ids["nospeech"],
        no_timestamps_id=ids["notimestamps"],
        timestamp_begin_id=backend.get_vocab_size(),
        transcribe_id=ids["transcribe"] if is_multilingual else None,
        translate_id=ids["translate"] if is_multilingual else None,
        language_ids={code: backend.token_to_id(f"<|{code}|>") for code in LANGUAGES} if is_multilingual else {},
    )
    return WhisperTokens(Tokenizer.load(folder), facts), facts
