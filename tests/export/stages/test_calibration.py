"""What calibration says that keys and values reach, held against the keys and values themselves."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from msgspec.structs import replace
from tests.export.builders.arrays import ArrayCheckpoint
from tests.export.builders.test_decoder import CONFIG, arrays
from tests.export.checkpoints import write_llama_folder

from sardonyx_export.families.llm import read_spec
from sardonyx_export.spec import Layer
from sardonyx_export.stages import verify
from sardonyx_export.stages.calibration import calibration_prompts, measure_ranges
from sardonyx_export.stages.reference import watch_attention

Array = npt.NDArray[Any]
PROMPTS = [np.random.default_rng(1).integers(0, 80, 30).tolist(), [7, 7, 7, 3]]


@pytest.mark.parametrize("half", [8, 4])
def test_keys_stay_in_their_range_wherever_they_are_and_values_reach_theirs(half: int) -> None:
    checkpoint, spec = ArrayCheckpoint(CONFIG, arrays()), read_spec(CONFIG)
    rope = replace(spec.ropes[0], rotary_size=2 * half, inverse_frequencies=spec.ropes[0].inverse_frequencies[:half])
    spec = replace(spec, ropes=(rope,))
    found: list[tuple[Array, Array]] = []
    watch_attention(checkpoint, spec, PROMPTS, lambda layer, keys, values: found.append((keys, values)))
    angles = np.random.default_rng(0).uniform(0, 2 * np.pi, (2000, 1, half))
    for (keys, values), reached in zip(found, measure_ranges(checkpoint, spec, PROMPTS), strict=True):
        assert keys.shape == values.shape == (34, 2, 16)
        np.testing.assert_array_equal(np.abs(values).max(axis=0), reached.value)
        largest = np.zeros_like(reached.key)
        for first, second in zip(keys[..., :half], keys[..., half : 2 * half], strict=True):
            turned = np.abs(first * np.cos(angles) - second * np.sin(angles)).max(axis=0)
            largest[:, :half] = np.maximum(largest[:, :half], turned)
        assert (largest[:, :half] <= reached.key[:, :half] * 1.001).all()
        assert (largest[:, :half] >= reached.key[:, :half] * 0.99).all()
        np.testing.assert_array_equal(reached.key[:, :half], reached.key[:, half : 2 * half])
        np.testing.assert_array_equal(np.abs(keys[..., 2 * half :]).max(axis=0), reached.key[:, 2 * half :])


def test_layers_without_rotation_reach_what_their_keys_are() -> None:
    spec = read_spec(CONFIG)
    bare = type(spec)(
        **{name: getattr(spec, name) for name in spec.__struct_fields__} | {"layers": (Layer(rope=None),)}
    )
    checkpoint = ArrayCheckpoint(CONFIG, arrays())
    keys: list[Array] = []
    watch_attention(checkpoint, bare, PROMPTS, lambda layer, found, values: keys.append(np.abs(found).max(axis=0)))
    np.testing.assert_array_equal(measure_ranges(checkpoint, bare, PROMPTS)[0].key, keys[0])


def test_prompts_have_texts_that_verification_has_not_and_tokens_from_all_over(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "tiny")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    *texts, spread = calibration_prompts(tokenizer, vocab_size=size + 100, max_model_len=2000)
    assert len(texts) == 5
    assert (spread[0], spread[-1]) == (0, size - 1)
    assert len(set(spread)) == min(256, size)
    seen = {tuple(prompt[:20]) for prompt in verify.make_prompts(tokenizer, vocab_size=size, max_model_len=2000)}
    assert not seen & {tuple(prompt[:20]) for prompt in texts}
    short = calibration_prompts(tokenizer, vocab_size=40, max_model_len=16)
    assert max(map(len, short)) == 16
    assert max(short[-1]) == 39
