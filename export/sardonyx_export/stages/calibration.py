"""How large keys and values become, for the scales of a quantised cache.

Measured on texts of our own and on tokens of the whole vocabulary, in the numpy pass over the source's weights. None of
the texts is among those that verification uses: what calibration has not seen and the cache cuts off counts there.
"""

from collections.abc import Callable, Sequence

import numpy as np
import tokenizers

from sardonyx_export.checkpoint import Checkpoint
from sardonyx_export.kv_ranges import Array, KvRange
from sardonyx_export.spec import DecoderSpec, Layer
from sardonyx_export.stages.reference import watch_attention

MAX_TEXT_TOKENS = 160
NUM_SPREAD_TOKENS = 256
"""Tokens at equal distances in the vocabulary: special ones, rare ones and those of scripts that no text here is in."""

_TEXTS = (
    "The ship had been at sea for eleven days when the wind turned. Nobody spoke of it at first. The captain went on "
    "writing in his log, the cook went on peeling potatoes, and only the youngest of the crew, a girl of seventeen "
    "who had never left her village before, stood at the rail and watched the water change its colour.",
    "import json\nfrom pathlib import Path\n\n\nclass Store:\n    def __init__(self, root: Path) -> None:\n"
    "        self._root = root\n\n    def read(self, key: str) -> dict[str, int]:\n"
    "        with (self._root / f'{key}.json').open() as file:\n            return json.load(file)\n",
    "| year | income | costs | share |\n|---|---|---|---|\n| 2021 | 1,204.50 | 998.13 | 17.1 % |\n"
    "| 2022 | 1,377.00 | 1,020.44 | 25.9 % |\n\nIf x^2 - 5x + 6 = 0, then x = 2 or x = 3, since (x - 2)(x - 3) = 0.",
    "User: My train was cancelled and I need to be in Lyon by noon. What can I do?\nAssistant: I am sorry to hear "
    "that. There are three ways: 1. the next train at 9:14, 2. a coach from the main station, 3. a shared car. "
    "Shall I look up prices?\nUser: Yes, please, and tell me which is the fastest!",
    "Die Brücke wurde im Frühjahr gesperrt, weil Taucher Risse in zwei Pfeilern fanden. Le pont restera fermé "
    "jusqu'en octobre. El alcalde dijo que las obras costarán más de cuatro millones. "
    "Мост закрыт до осени. 橋は秋まで閉鎖される。",
)


def calibration_prompts(tokenizer: tokenizers.Tokenizer, *, vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Token ids to calibrate on: the texts, then tokens of the whole vocabulary.

    Args:
        tokenizer: gives no id that the model has no embedding for, see `stages.verify.make_prompts`.
        vocab_size: of the model.
        max_model_len: none is longer.
    """
    prompts = [tokenizer.encode(text).ids[: min(MAX_TEXT_TOKENS, max_model_len)] for text in _TEXTS]
    num_known = min(vocab_size, tokenizer.get_vocab_size())
    num_spread = min(NUM_SPREAD_TOKENS, max_model_len, num_known)
    spread = np.linspace(0, num_known - 1, num_spread).astype(np.int64)
    return [*(prompt for prompt in prompts if prompt), spread.tolist()]


def measure_ranges(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[KvRange]:
    """What the keys and values of each layer reach, over all tokens of all prompts.

    A rotation turns a channel and its partner into each other, and prompts are short: of both, the length of the pair
    is measured, which neither exceeds at any position.

    Args:
        checkpoint: the weights, dequantised as they are read.
        spec: what they mean.
        prompts: token ids.
        progress: called with layers done and layers in all.

    Raises:
        ExportError: a tensor is missing or cannot be read.
    """
    ranges: list[KvRange] = []

    def watch(layer: Layer, keys: Array, values: Array) -> None:
        pairs = np.abs(keys)
        if layer.rope is not None:
            half = spec.ropes[layer.rope].rotary_size // 2
            pairs[..., :half] = pairs[..., half : 2 * half] = np.hypot(keys[..., :half], keys[..., half : 2 * half])
        ranges.append(KvRange(key=pairs.max(axis=0), value=np.abs(values).max(axis=0)))

    watch_attention(checkpoint, spec, prompts, watch, progress)
    return ranges
