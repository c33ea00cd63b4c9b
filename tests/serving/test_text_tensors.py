"""A small real language model, asked in tensors."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.serving import tensor_serving
from tests.serving.fakes import until
from tests.serving.tensor_serving import call, tensor
from tests.tiny_models import make_language_model

from sardonyx.core import SamplingParams
from sardonyx.errors import InvalidRequest, ModelNotReady, Overloaded, UnsupportedFeature
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import InferAnswer, InferCall
from sardonyx.serving.text import GenerationOptions
from sardonyx.serving.text_tensors import TextTensorModel
from sardonyx.tensors import Tensor

GREEDY = {"temperature": 0.0, "max_tokens": 12}
PROMPT = "the cat"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    make_language_model(root, "llm")
    return root


def run(root: Path, test: Callable[[TextTensorModel], Awaitable[None]], **options: Any) -> None:
    async def main(registry: Registry) -> None:
        model = registry.served("llm")
        assert isinstance(model, TextTensorModel)
        await test(model)

    tensor_serving.run(root, main, **({"kv_cache_bytes": 1 << 24, "max_num_seqs": 4} | options))


def flag(name: str, value: bool) -> Tensor:
    return Tensor(name, "BOOL", np.array([value]))


def asked(prompt: str | bytes = PROMPT, *more: Tensor, **parameters: Any) -> InferCall:
    return call(tensor("text_input", [prompt], "BYTES"), *more, parameters=GREEDY | parameters)


def text(answer: InferAnswer) -> str:
    (output,) = answer.outputs
    assert (output.name, output.datatype, output.array.shape) == ("text_output", "BYTES", (1,))
    return output.array[0].decode()


async def reference(model: TextTensorModel, prompt: str = PROMPT, **options: Any) -> str:
    """What the text model itself says."""
    wanted = {"max_tokens": 12, "sampling": SamplingParams(temperature=0.0)} | options
    generation = await model.text.start([prompt], GenerationOptions(**wanted), request_id="reference")
    (choice,) = await generation.collect()
    return choice.text


def test_text_is_what_the_text_model_gives(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        answer = await model.infer(asked())
        assert text(answer) == await reference(model) != ""
        assert answer.is_final
        assert answer.parameters == {"finish_reason": "length"}

    run(root, test)


def test_pieces_of_a_stream_add_up_to_the_text(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        wanted = asked(PROMPT, flag("stream", True), max_tokens=150, ignore_eos=True)
        answers = [each async for each in model.stream(wanted)]
        assert len(answers) > 1
        assert "".join(map(text, answers)) == await reference(model, max_tokens=150, ignore_eos=True)
        assert [each.is_final for each in answers] == [False] * (len(answers) - 1) + [True]
        assert [each.parameters for each in answers if each.parameters] == [{"finish_reason": "length"}]

    run(root, test)


def test_stream_may_be_asked_for_by_parameter_and_is_one_answer_without(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        long = {"max_tokens": 150, "ignore_eos": True}
        pieces = [each async for each in model.stream(asked(stream=True, **long))]
        whole = [each async for each in model.stream(asked(**long))]
        assert len(pieces) > len(whole) == 1
        assert "".join(map(text, pieces)) == text(whole[0])
        assert whole[0].is_final

    run(root, test)


def test_unary_call_that_asks_for_a_stream_is_refused(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        assert model.is_decoupled
        for wanted in (asked(stream=True), asked(PROMPT, flag("stream", True))):
            with pytest.raises(UnsupportedFeature, match="doesn't support models with decoupled transaction policy"):
                await model.infer(wanted)
        await model.infer(asked(PROMPT, flag("stream", False)))

    run(root, test)


def test_input_is_repeated_where_it_is_not_excluded(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        completion = await reference(model)
        assert text(await model.infer(asked(PROMPT, flag("exclude_input_in_output", False)))) == PROMPT + completion
        assert text(await model.infer(asked(exclude_input_in_output=False))) == PROMPT + completion
        assert text(await model.infer(asked(exclude_input_in_output=True))) == completion
        with pytest.raises(InvalidRequest, match="exclude_input_in_output: must not be false together with stream"):
            await anext(model.stream(asked(stream=True, exclude_input_in_output=False)))

    run(root, test)


def test_sampling_parameters_may_come_as_json_and_win(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        longer = tensor("sampling_parameters", [json.dumps({"max_tokens": 20})], "BYTES")
        assert text(await model.infer(asked(PROMPT, longer))) == await reference(model, max_tokens=20)
        empty = tensor("sampling_parameters", [""], "BYTES")
        assert text(await model.infer(asked(PROMPT, empty))) == await reference(model)

    run(root, test)


def test_numbers_may_come_as_texts(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        assert text(await model.infer(asked(max_tokens="20", temperature="0"))) == await reference(model, max_tokens=20)

    run(root, test)


def test_stop_texts_end_the_completion(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        whole = await reference(model)
        stop = whole[3:6]
        for given in (stop, [stop, "nowhere"]):
            parameters = tensor("sampling_parameters", [json.dumps({"stop": given})], "BYTES")
            answer = await model.infer(asked(PROMPT, parameters))
            assert text(answer) == whole[: whole.index(stop)]
            assert answer.parameters == {"finish_reason": "stop"}
        assert text(await model.infer(asked(stop=stop))) == whole[: whole.index(stop)]

    run(root, test)


def test_seed_gives_the_same_text_again(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        texts = [text(await model.infer(asked(temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]

    run(root, test)


@pytest.mark.parametrize("parameters", [{"top_p": 0.0}, {"top_k": 1}, {"top_k": -1, "top_p": 0.0}])
def test_what_leaves_one_token_is_greedy(root: Path, parameters: dict[str, Any]) -> None:
    async def test(model: TextTensorModel) -> None:
        assert text(await model.infer(asked(**(parameters | {"temperature": 1.0})))) == await reference(model)

    run(root, test)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 1 << 40}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 1e9}, "presence_penalty"),
        ({"seed": 1 << 63}, "seed"),
        ({"ignore_eos": "perhaps"}, "ignore_eos"),
        ({"temprature": 1}, "temprature"),
        ({"stream": "yes"}, "stream"),
        ({"exclude_input_in_output": 1}, "exclude_input_in_output"),
    ],
)
def test_bad_parameters_are_named(root: Path, parameters: dict[str, Any], name: str) -> None:
    async def test(model: TextTensorModel) -> None:
        with pytest.raises(InvalidRequest, match=name) as refusal:
            await model.infer(asked(**parameters))
        assert refusal.value.param == name
        assert "$" not in refusal.value.message

    run(root, test)


@pytest.mark.parametrize("data", ["[1]", "{", '"x"', "[" * 100_000, "null"])
def test_sampling_parameters_that_are_no_object_are_refused(root: Path, data: str) -> None:
    async def test(model: TextTensorModel) -> None:
        with pytest.raises(InvalidRequest, match="sampling_parameters: expected a JSON object"):
            await model.infer(asked(PROMPT, tensor("sampling_parameters", [data], "BYTES")))

    run(root, test)


def test_flags_among_the_sampling_parameters_are_refused_by_name(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        with pytest.raises(InvalidRequest, match="stream"):
            await model.infer(asked(PROMPT, tensor("sampling_parameters", ['{"stream": true}'], "BYTES")))

    run(root, test)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (call(), "expected number of inputs between 1 and 4 but got 0 inputs"),
        (call(tensor("X", [1])), "unexpected inference input 'X' for model 'llm'"),
        (call(tensor("text_input", [1])), "input 'text_input' data-type is 'INT32', but model 'llm' expects 'BYTES'"),
        (call(tensor("text_input", ["a", "b"], "BYTES")), r"unexpected shape for input 'text_input' .* got \[2\]"),
        (call(tensor("text_input", [b"\xff"], "BYTES")), "input 'text_input' is not UTF-8"),
        (call(tensor("text_input", ["a"], "BYTES"), outputs=["X"]), "unexpected inference output 'X' for model 'llm'"),
    ],
)
def test_tensors_that_do_not_suit_are_refused(root: Path, wanted: InferCall, message: str) -> None:
    async def test(model: TextTensorModel) -> None:
        with pytest.raises(InvalidRequest, match=message):
            await model.infer(wanted)
        assert model.statistics.num_pending == 0

    run(root, test)


def test_text_may_come_with_a_batch_axis(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        wanted = call(tensor("text_input", [[PROMPT]], "BYTES"), parameters=GREEDY)
        assert text(await model.infer(wanted)) == await reference(model)

    run(root, test)


def test_calls_and_pieces_are_counted(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        await model.infer(asked())
        pieces = [each async for each in model.stream(asked(stream=True))]
        statistics = model.statistics
        assert (statistics.success.count, statistics.inference_count, statistics.execution_count) == (2, 2, 2)
        assert statistics.queue.count == 2
        assert sorted(statistics.responses) == list(range(len(pieces)))
        assert all(each.success.count == 1 for each in statistics.responses.values())
        with pytest.raises(InvalidRequest):
            await model.infer(asked("x" * 5000))
        assert statistics.failures == {"OTHER": 1}

    run(root, test)


def test_leaving_a_stream_ends_the_generation(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        answers = model.stream(asked(stream=True, max_tokens=200, ignore_eos=True))
        await anext(answers)
        assert (model.statistics.num_pending, model.text.num_active) == (1, 1)
        await answers.aclose()  # type: ignore[attr-defined]
        assert model.statistics.num_pending == 0
        await until(lambda: model.text.num_active == 0)
        assert model.statistics.failures == {"CANCELED": 1}
        assert model.statistics.success.count == 0

    run(root, test)


def test_cancelling_a_call_ends_the_generation(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        task = asyncio.create_task(model.infer(asked(max_tokens=200, ignore_eos=True)))
        await until(lambda: model.text.stats().num_running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        await until(lambda: model.text.num_active == 0)
        assert (model.statistics.num_pending, model.statistics.failures) == (0, {"CANCELED": 1})

    run(root, test)


def test_stopping_generation_ends_it_with_what_there_is(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        answers = model.stream(asked(stream=True, max_tokens=200, ignore_eos=True))
        first = await anext(answers)
        assert model.stop_generation() == 1
        rest = [each async for each in answers]
        assert rest[-1].is_final
        assert rest[-1].parameters == {"finish_reason": "cancelled"}
        assert text(first)

    run(root, test)


def test_refused_call_counts_as_rejected(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        held = asyncio.create_task(model.infer(asked(max_tokens=200, ignore_eos=True)))
        await until(lambda: model.text.stats().num_running == 1)
        with pytest.raises(Overloaded):
            await model.infer(asked())
        assert model.statistics.failures == {"REJECTED": 1}
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)

    run(root, test, max_queued_requests=1)


def test_closed_model_takes_no_calls(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        held = asyncio.create_task(model.infer(asked(max_tokens=200, ignore_eos=True)))
        await until(lambda: model.text.stats().num_running == 1)
        await model.close()
        with pytest.raises(ModelNotReady):
            await held
        with pytest.raises(ModelNotReady):
            await model.infer(asked())
        assert model.statistics.failures == {"REJECTED": 2}

    run(root, test)


def test_model_shows_a_config_with_its_tensors(root: Path) -> None:
    async def test(model: TextTensorModel) -> None:
        config = model.config
        assert (config.name, config.platform, config.backend) == ("llm", "onnxruntime_onnx", "onnxruntime")
        assert config.model_transaction_policy.decoupled
        assert [(each.name, each.optional) for each in config.input] == [
            (each.name, each.is_optional) for each in model.inputs
        ]
        assert [each.name for each in config.output] == ["text_output"]
        assert model.labels("text_output") == []
        assert (model.version, model.is_alive, model.stalled_s) == (1, True, 0.0)
        assert model.size_bytes > 0

    run(root, test)
