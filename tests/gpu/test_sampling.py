"""Tokens drawn on a card, against the host's sampler and against what chance should give."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.export.builders.test_sampler import agrees
from tests.gpu.card import needs_device, open_device

from sardonyx.core import SamplingParams
from sardonyx.runtime.device import DeviceTensor
from sardonyx.runtime.dtypes import DATATYPES
from sardonyx_export.builders.sampler import build_sampler

pytestmark = needs_device

Floats = npt.NDArray[np.float32]
VOCAB_SIZES = (512, 128_256)
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(temperature=1.3, top_k=40),
    SamplingParams(temperature=0.8, min_p=0.05),
    SamplingParams(temperature=2.0, top_k=7, top_p=0.8, min_p=0.01),
)


class SamplerOnDevice:
    def __init__(self, vocab_size: int, folder: Path) -> None:
        self._device = open_device()
        self._session = self._device.open(build_sampler(vocab_size, folder)[0], model_name="sampler")

    def draw(self, logits: Floats, params: list[SamplingParams], uniform: Floats) -> dict[str, npt.NDArray[Any]]:
        feeds = {"logits": logits, "uniform": uniform, "top_k": np.array([each.top_k for each in params], np.int64)}
        for name in ("temperature", "top_p", "min_p"):
            feeds[name] = np.array([getattr(each, name) for each in params], np.float32)
        binding, device = self._session.new_binding(), self._device
        for name, values in feeds.items():
            tensor = self._new(self._session.inputs[name].datatype.name, values.shape)
            device.write(tensor.address, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
            binding.bind_input(name, tensor)
        outputs, found = {}, {}
        for name, spec in self._session.outputs.items():
            outputs[name] = self._new(spec.datatype.name, (len(params),))
            binding.bind_output(name, outputs[name])
            found[name] = np.empty(len(params), spec.datatype.array)
        binding.run()
        for name, tensor in outputs.items():
            device.read(tensor.address, found[name].view(np.uint8))
        device.mark().wait()
        return found

    def close(self) -> None:
        self._session.close()
        self._device.close()

    def _new(self, datatype: str, shape: tuple[int, ...]) -> DeviceTensor:
        tensor = DeviceTensor(0, shape, DATATYPES[datatype])
        return DeviceTensor(self._device.allocate(tensor.num_bytes), shape, DATATYPES[datatype])


@pytest.fixture(params=VOCAB_SIZES)
def sampler(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[SamplerOnDevice, int]]:
    opened = SamplerOnDevice(request.param, tmp_path)
    yield opened, request.param
    opened.close()


def make_logits(num_rows: int, vocab_size: int, seed: int) -> Floats:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab_size)) * 3).astype(np.float32)


def test_rows_get_the_host_s_tokens(sampler: tuple[SamplerOnDevice, int]) -> None:
    device_sampler, vocab_size = sampler
    params = list(PARAMS) * 8
    logits = make_logits(len(params), vocab_size, 1)
    uniform = np.random.default_rng(2).random(len(params), np.float32)
    found = device_sampler.draw(logits, params, uniform)
    assert found["is_finite"].all()
    # Without top_k, a nucleus of more than 1,024 tokens is cut there by the graph and not by the host.
    is_comparable = [bool(each.temperature == 0 or each.top_k or vocab_size <= 1024) for each in params]
    wrong = [
        (index, params[index], int(token))
        for index, token in enumerate(found["token_ids"])
        if is_comparable[index] and not agrees(logits[index], params[index], float(uniform[index]), int(token))
    ]
    assert not wrong, f"{len(wrong)} of {sum(is_comparable)} rows differ from the host's: {wrong[:3]}"
    shifted = logits - logits.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted.astype(np.float64)).sum(axis=1, keepdims=True))
    expected = logprobs[np.arange(len(params)), found["token_ids"]]
    np.testing.assert_allclose(found["logprobs"], expected, atol=1e-3)


def test_a_row_s_token_does_not_depend_on_the_others(sampler: tuple[SamplerOnDevice, int]) -> None:
    device_sampler, vocab_size = sampler
    params = list(PARAMS) * 2
    logits = make_logits(len(params), vocab_size, 3)
    uniform = np.random.default_rng(4).random(len(params), np.float32)
    together = device_sampler.draw(logits, params, uniform)["token_ids"].tolist()
    alone = [
        int(device_sampler.draw(logits[i : i + 1], params[i : i + 1], uniform[i : i + 1])["token_ids"][0])
        for i in range(len(params))
    ]
    assert together == alone


def test_greedy_ties_go_to_the_lowest_id_and_rows_that_are_no_number_say_so(
    sampler: tuple[SamplerOnDevice, int],
) -> None:
    device_sampler, vocab_size = sampler
    logits = make_logits(4, vocab_size, 5)
    logits[0, [9, 300, vocab_size - 1]] = 50.0
    logits[1, 17] = np.nan
    logits[2, :] = -np.inf
    found = device_sampler.draw(logits, [PARAMS[0]] * 4, np.full(4, 0.5, np.float32))
    assert found["is_finite"].tolist() == [True, False, False, True]
    assert found["token_ids"][0] == 9
    assert found["token_ids"][3] == logits[3].argmax()


def test_shares_of_tokens_are_their_probabilities(sampler: tuple[SamplerOnDevice, int]) -> None:
    device_sampler, vocab_size = sampler
    num_draws, params = 512, SamplingParams(temperature=0.9, top_k=5)
    row = make_logits(1, vocab_size, 6)
    uniform = ((np.arange(num_draws) + 0.5) / num_draws).astype(np.float32)
    found = device_sampler.draw(np.repeat(row, num_draws, 0), [params] * num_draws, uniform)["token_ids"]
    likeliest = np.argsort(-row[0], kind="stable")[:5]
    weights = np.exp((row[0, likeliest] - row[0, likeliest[0]]).astype(np.float64) / 0.9)
    shares = np.array([(found == token).mean() for token in likeliest])
    # Evenly spaced draws leave each share within one draw on either side.
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=2.5 / num_draws)
