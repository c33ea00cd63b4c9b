"""Rotary embeddings by their properties; their numbers are compared in `test_llm_parity.py`."""

import math
from typing import Any

import numpy as np
import pytest

from sardonyx_export.errors import ExportError
from sardonyx_export.families.config import ConfigReader
from sardonyx_export.families.rope import read_rope
from sardonyx_export.spec import Rope

POSITIONS = {"max_position_embeddings": 4096}


def rope(max_model_len: int = 4096, *, is_partial: bool = False, **fields: Any) -> Rope:
    return read_rope(ConfigReader(POSITIONS | fields), 64, max_model_len, is_partial=is_partial)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048},
    ],
)
def test_old_and_new_spellings_are_the_same(scaling: dict[str, Any]) -> None:
    old = rope(rope_theta=2e4, rope_scaling=scaling)
    new = rope(rope_parameters={**scaling, "rope_theta": 2e4})
    assert old == new != rope(rope_theta=2e4)


def test_without_any_field_the_base_is_ten_thousand() -> None:
    plain = rope()
    assert plain.rotary_size == 64
    assert plain.attention_factor == 1
    np.testing.assert_allclose(plain.inverse_frequencies, 1e4 ** (-np.arange(32) / 32), rtol=1e-6)


def test_a_partial_rotation_leaves_the_rest_of_a_head_alone() -> None:
    part = rope(is_partial=True, partial_rotary_factor=0.75)
    assert part.rotary_size == 48
    assert len(part.inverse_frequencies) == 24


def test_a_rotation_that_the_kernel_cannot_do_is_refused() -> None:
    with pytest.raises(ExportError, match="multiple of 16"):
        rope(is_partial=True, partial_rotary_factor=0.4)


def test_llama3_keeps_fast_waves_and_stretches_slow_ones() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = np.array(rope(rope_scaling={**scaling, "original_max_position_embeddings": 512}).inverse_frequencies)
    plain = np.array(rope().inverse_frequencies)
    wavelengths = 2 * math.pi / plain
    assert (scaled[wavelengths < 128] == plain[wavelengths < 128]).all()
    np.testing.assert_allclose(scaled[wavelengths > 512], plain[wavelengths > 512] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


def test_yarn_raises_the_temperature_by_its_factor_unless_told() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert rope(rope_scaling=scaling).attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert rope(rope_scaling={**scaling, "attention_factor": 1.5}).attention_factor == 1.5


@pytest.mark.parametrize(("max_model_len", "stretch"), [(512, 1.0), (513, 2.0)])
def test_longrope_chooses_its_factors_by_the_longest_sequence_to_serve(max_model_len: int, stretch: float) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
    chosen = rope(max_model_len, rope_scaling=scaling, original_max_position_embeddings=512)
    assert chosen.inverse_frequencies[0] == 1 / stretch
    assert chosen.attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(512)))


def test_longrope_needs_a_factor_for_each_frequency() -> None:
    with pytest.raises(ExportError, match=r"rope_scaling\.long_factor: has 31 numbers; 32 are needed"):
        rope(rope_scaling={"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 31})
