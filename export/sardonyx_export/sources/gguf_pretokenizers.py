"""How text is split before byte-level BPE, by the names that llama.cpp gave the rules (``tokenizer.ggml.pre``).

The expressions are the ones of the models' own tokenizer.json files; where a model has none that we know, llama.cpp's.
"""

from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER_LOWER = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SLASHED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_UPPER_LOWER[0]}|{_UPPER_LOWER[1]}|\p{{N}}|{_SLASHED_REST}"
_GPT4O = rf"{_UPPER_LOWER[0]}{_CONTRACTIONS}?|{_UPPER_LOWER[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASHED_REST}"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(slots=True, frozen=True)
class PreTokenizer:
    """One splitting rule."""

    patterns: tuple[str, ...]
    """Each splits what the ones before it left."""
    is_digit_first: bool = False
    """Every digit stands alone, before the patterns look."""
    ignores_merges: bool = False
    """A word that is a token is that token, whatever its merges lead to; such models also begin with BOS."""
    normalises: bool = False
    """Text is brought to Unicode's NFC first."""

    def to_json(self) -> dict[str, Any]:
        """As tokenizer.json has it, ending in the byte-level alphabet."""
        steps: list[dict[str, Any]] = []
        if self.is_digit_first:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.patterns == (_GPT2,):
            # ByteLevel's own expression is this one.
            return _sequence([*steps, _byte_level(use_regex=True)])
        steps += [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        return _sequence([*steps, _byte_level(use_regex=False)])


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


_RULES: list[tuple[PreTokenizer, tuple[str, ...]]] = [
    (PreTokenizer(_DEFAULT), ("default",)),
    (PreTokenizer((_GPT2,)), ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4")),
    # SmolLM, StarCoder, Granite: llama.cpp splits \p{N} off one by one, which is what Digits does.
    (
        PreTokenizer((_GPT2,), is_digit_first=True),
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    (
        PreTokenizer((_LLAMA3,), ignores_merges=True),
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
    ),
    (PreTokenizer((_LLAMA3,)), ("dbrx", "smaug-bpe")),
    (PreTokenizer((_QWEN2,), normalises=True), ("qwen2", "deepseek-r1-qwen", "megrez")),
    (PreTokenizer((_QWEN2,)), ("stablelm2", "hunyuan", "solar-open")),
    (PreTokenizer((_TEKKEN,), ignores_merges=True), ("tekken",)),
    (PreTokenizer((_GPT4O,)), ("gpt-4o", "llama4")),
]

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: rule for rule, names in _RULES for name in names}
