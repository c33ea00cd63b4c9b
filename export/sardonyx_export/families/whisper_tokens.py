"""The tokens that steer a Whisper model, and the heads that follow the sound, as a checkpoint's files say.

Ids come from the tokenizer's own names, since they differ from one release to the next. What
``generation_config.json`` says of suppressed tokens, languages and heads is taken in Hugging Face's words
(``suppress_tokens``, ``lang_to_id``) and in CTranslate2's (``suppress_ids``, ``lang_ids``).

Source: ``tokenizer.py``, ``decoding.py`` and ``model.py`` of openai-whisper for names, for what is no speech, and for
the heads of models that do not say theirs.
"""

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from sardonyx.repository.families import KvLayout, Whisper
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.texts import parse_object
from sardonyx_export.whisper_spec import WhisperSpec

_TOKENIZER, _GENERATION = "tokenizer.json", "generation_config.json"
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_FIRST_TIMESTAMP = "<|0.00|>"
_ENGLISH_VOCAB_SIZE = 51_864
"""Of all English-only checkpoints; multilingual ones have a token more, or two."""
_DERIVED = -1
"""In a list of suppressed tokens: the signs that are no speech."""

_SIGNS = '"#()*+/:;<=>@[\\]^_`{|}~「」『』'
_SEQUENCES = "<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪"
_NOTES = "♩♪♫♬♭♮♯"
"""Written in several bytes of which the first already means music."""


def read_whisper_facts(texts: Mapping[str, bytes], config: Mapping[str, Any], spec: WhisperSpec) -> Whisper:
    """What the manifest says of a model.

    Args:
        texts: ``tokenizer.json``, and ``generation_config.json`` where the checkpoint has one.
        config: for suppressed tokens, which older checkpoints keep there.
        spec: the model's sizes.

    Raises:
        ExportError: the tokenizer is none or lacks a token, or a file names a token or a head that does not exist.
    """
    tokenizer = _load(texts)
    generation = parse_object(texts.get(_GENERATION, b"{}"), file=_GENERATION)
    return _Reader(tokenizer, generation, config, spec).read()


def _load(texts: Mapping[str, bytes]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(texts[_TOKENIZER])
    except Exception as error:  # the library raises bare Exception, whatever is wrong
        raise ExportError(f"cannot be loaded: {error}", file=_TOKENIZER) from error


class _Reader:
    """One checkpoint's files."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        generation: Mapping[str, Any],
        config: Mapping[str, Any],
        spec: WhisperSpec,
    ) -> None:
        self._tokenizer = tokenizer
        self._generation = generation
        self._config = config
        self._spec = spec

    def read(self) -> Whisper:
        spec = self._spec
        end, no_timestamps = self._token("<|endoftext|>"), self._token("<|notimestamps|>")
        first_timestamp = self._tokenizer.token_to_id(_FIRST_TIMESTAMP)
        # Files of English-only models name no timestamps, though the model has them.
        timestamp_begin = no_timestamps + 1 if first_timestamp is None else first_timestamp
        if not end < no_timestamps < timestamp_begin < spec.vocab_size:
            raise ExportError(
                f"has {end} as its end, {no_timestamps} for no timestamps, {timestamp_begin} as the first timestamp: "
                f"they should ascend, below the model's {spec.vocab_size:,} tokens",
                file=_TOKENIZER,
            )
        is_multilingual = self._is_multilingual()
        return Whisper(
            vocab_size=spec.vocab_size,
            max_model_len=spec.max_model_len,
            num_mels=spec.num_mels,
            num_frames=spec.num_frames,
            kv=KvLayout(
                num_layers=spec.num_decoder_layers, num_kv_heads=spec.num_decoder_heads, head_size=spec.head_size
            ),
            start_id=self._token("<|startoftranscript|>"),
            end_id=end,
            previous_id=self._token("<|startofprev|>"),
            no_speech_id=self._token("<|nospeech|>", "<|nocaptions|>"),
            no_timestamps_id=no_timestamps,
            timestamp_begin_id=timestamp_begin,
            transcribe_id=self._token("<|transcribe|>") if is_multilingual else None,
            translate_id=self._token("<|translate|>") if is_multilingual else None,
            language_ids=self._languages(end) if is_multilingual else {},
            suppress_ids=self._suppressed(end, timestamp_begin),
            begin_suppress_ids=self._suppressed_at_begin(end),
            alignment_heads=self._alignment_heads(),
        )

    def _token(self, *names: str) -> int:
        """The id of the first name that the tokenizer knows."""
        for name in names:
            found = self._tokenizer.token_to_id(name)
            if found is not None:
                return int(found)
        raise ExportError(f"has no token {' or '.join(names)}, which Whisper needs", file=_TOKENIZER)

    def _is_multilingual(self) -> bool:
        said = self._generation.get("is_multilingual")
        return said if isinstance(said, bool) else self._spec.vocab_size != _ENGLISH_VOCAB_SIZE

    def _languages(self, end: int) -> dict[str, int]:
        named = self._generation.get("lang_to_id")
        listed = named.values() if isinstance(named, dict) else self._generation.get("lang_ids")
        known = {
            token_id: match[1]
            for text, token_id in self._tokenizer.get_vocab(with_added_tokens=True).items()
            if token_id > end and (match := _LANGUAGE.fullmatch(text))
        }
        ids = sorted(known if listed is None else self._checked(list(listed), "lang_to_id"))
        for token_id in ids:
            if token_id not in known:
                raise ExportError(f"names token {token_id}, which is no language", file=_GENERATION, field="lang_to_id")
        if not ids:
            raise ExportError("has no tokens of languages, such as <|en|>", file=_TOKENIZER)
        return {known[token_id]: token_id for token_id in ids}

    def _suppressed(self, end: int, timestamp_begin: int) -> list[int]:
        listed = self._said("suppress_tokens", "suppress_ids")
        ids = set(self._signs() if listed is None else listed)
        if _DERIVED in ids:
            ids = (ids - {_DERIVED}) | self._signs()
        # All that lies between text and timestamps steers the decoder.
        ids |= set(range(end + 1, timestamp_begin))
        return sorted(each for each in ids if each < timestamp_begin and each != end)

    def _suppressed_at_begin(self, end: int) -> list[int]:
        listed = self._said("begin_suppress_tokens", "suppress_ids_begin")
        return sorted({*self._encode(" "), end} if listed is None else set(listed) - {_DERIVED})

    def _said(self, *names: str) -> list[int] | None:
        """A list of tokens; ``None``: no file has it."""
        for source in (self._generation, self._config):
            for name in names:
                if source.get(name) is not None:
                    return self._checked(source[name], name)
        return None

    def _checked(self, value: Any, field: str) -> list[int]:
        is_list = isinstance(value, list) and all(isinstance(each, int) for each in value)
        if not is_list or not all(_DERIVED <= each < self._spec.vocab_size for each in value):
            raise ExportError(f"{value!r:.80} is no list of tokens of this model", file=_GENERATION, field=field)
        return list(value)

    def _signs(self) -> set[int]:
        """Tokens of what is written but not said, a dash or an apostrophe in front of a word among them."""
        found = {ids[0] for text in (" -", " '") if (ids := self._encode(text))}
        for sign in (*_SIGNS, *_SEQUENCES.split(), *_NOTES):
            for text in (sign, f" {sign}"):
                ids = self._encode(text)
                if len(ids) == 1 or (ids and sign in _NOTES):
                    found.add(ids[0])
        return found

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _alignment_heads(self) -> list[list[int]]:
        spec, said = self._spec, self._generation.get("alignment_heads")
        if said is None:
            layers = range(spec.num_decoder_layers // 2, spec.num_decoder_layers)
            return [[layer, head] for layer in layers for head in range(spec.num_decoder_heads)]
        if not isinstance(said, list) or not all(_is_head(each, spec) for each in said):
            raise ExportError(
                f"{said!r:.80} is no list of heads; the decoder has {spec.num_decoder_layers} layers of "
                f"{spec.num_decoder_heads}",
                file=_GENERATION,
                field="alignment_heads",
            )
        return [list(each) for each in said]


def _is_head(value: Any, spec: WhisperSpec) -> bool:
    limits = (spec.num_decoder_layers, spec.num_decoder_heads)
    return (
        isinstance(value, list)
        and len(value) == len(limits)
        and all(isinstance(each, int) and 0 <= each < limit for each, limit in zip(value, limits, strict=True))
    )
