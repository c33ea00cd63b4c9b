"""Encoder models over KServe-v2's nouns."""

from typing import Any

import numpy as np
import pytest
from tests.serving.encoder_serving import embedding_of, ids_of, run
from tests.tiny_encoders import LABELS

from sardonyx.errors import ContextLengthExceeded, InvalidRequest
from sardonyx.serving.served import InferCall
from sardonyx.serving.tasks import EncodeOptions
from sardonyx.tensors import Tensor, TensorMetadata


def call(*names: str, rows: list[Any], **options: Any) -> InferCall:
    """Each row holds a text for each name."""
    columns = np.array(rows, object).reshape(len(rows), len(names))
    inputs = []
    for n, name in enumerate(names):
        array = np.empty((len(rows), 1), object)
        array[:, 0] = [each.encode() if isinstance(each, str) else each for each in columns[:, n]]
        inputs.append(Tensor(name, "BYTES", array))
    return InferCall(inputs=inputs, **options)


def text(*rows: Any, **options: Any) -> InferCall:
    return call("text", rows=list(rows), **options)


async def values(model, asked: InferCall) -> np.ndarray:
    answer = await model.infer(asked)
    (tensor,) = answer.outputs
    assert tensor.datatype == "FP32"
    assert answer.is_final
    return tensor.array


def test_embedding_model_takes_texts_and_gives_vectors(tmp_path) -> None:
    async def test(model) -> None:
        assert model.inputs == (TensorMetadata(name="text", datatype="BYTES", shape=(-1, 1)),)
        assert model.outputs == (TensorMetadata(name="embeddings", datatype="FP32", shape=(-1, 16)),)
        assert model.labels("embeddings") == []
        got = await values(model, text("cat", "dog sun"))
        folder = tmp_path / "tiny" / "1"
        np.testing.assert_allclose(got, [embedding_of(folder, ids_of(each)) for each in ("cat", "dog sun")], atol=1e-5)
        streamed = [each async for each in model.stream(text("cat", outputs=["embeddings"]))]
        np.testing.assert_allclose(streamed[0].outputs[0].array, got[:1], atol=1e-6)
        assert not model.is_decoupled
        assert model.stop_generation() == 0

    statistics = run(tmp_path, test)
    assert (statistics.success.count, statistics.inference_count) == (2, 3)


def test_config_is_completed_for_metadata(tmp_path) -> None:
    async def test(model) -> None:
        config = model.config
        assert (config.platform, config.backend, config.max_batch_size) == ("onnxruntime_onnx", "onnxruntime", 2048)
        assert [(each.name, list(each.dims)) for each in config.input] == [("text", [1])]
        assert [(each.name, list(each.dims)) for each in config.output] == [("embeddings", [16])]

    run(tmp_path, test)


def test_prompt_is_chosen_by_name(tmp_path) -> None:
    async def test(model) -> None:
        folder = tmp_path / "tiny" / "1"
        named = await values(model, text("cat", parameters={"prompt_name": "query"}))
        np.testing.assert_allclose(named, [embedding_of(folder, ids_of("query: cat"))], atol=1e-5)
        default = await values(model, text("cat"))
        np.testing.assert_allclose(default, [embedding_of(folder, ids_of("passage: cat"))], atol=1e-5)
        with pytest.raises(InvalidRequest, match="no prompt 'nobody'; it has query, document"):
            await model.infer(text("cat", parameters={"prompt_name": "nobody"}))

    run(tmp_path, test, embeddings={"default_prompt": "document"})


@pytest.mark.parametrize("truncate", [True, "true", 64, "64"])
def test_long_text_is_cut_where_the_call_says_so(tmp_path, truncate) -> None:
    async def test(model) -> None:
        long = "cat " * 70
        with pytest.raises(ContextLengthExceeded):
            await model.infer(text(long))
        ids = ids_of(long)
        got = await values(model, text(long, parameters={"truncate": truncate}))
        np.testing.assert_allclose(got, [embedding_of(tmp_path / "tiny" / "1", [*ids[:63], ids[-1]])], atol=1e-5)

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"truncat": True}, "truncat: is no parameter of an embedding model; there are truncate, prompt_name"),
        ({"truncate": 0}, "truncate: expected"),
        ({"truncate": "perhaps"}, "truncate: expected"),
        ({"prompt_name": 3}, "prompt_name: expected str"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(tmp_path, parameters, reason) -> None:
    async def test(model) -> None:
        with pytest.raises(InvalidRequest, match=reason) as caught:
            await model.infer(text("cat", parameters=parameters))
        assert caught.value.param == next(iter(parameters))

    run(tmp_path, test)


def test_calls_that_do_not_suit_the_model_are_refused(tmp_path) -> None:
    async def test(model) -> None:
        for asked, reason in (
            (call("texts", rows=["cat"]), "unexpected inference input 'texts'"),
            (InferCall(inputs=[Tensor("text", "FP32", np.zeros((1, 1), np.float32))]), "data-type is 'FP32'"),
            (InferCall(inputs=[Tensor("text", "BYTES", np.array([b"cat"], object))]), r"Expected \[-1,1\], got \[1\]"),
            (text("cat", "cat", "cat"), "batch-size must be <= 2"),
            (text("cat", outputs=["scores"]), "unexpected inference output 'scores'"),
            (text(b"\xff"), "is not UTF-8"),
        ):
            with pytest.raises(InvalidRequest, match=reason):
                await model.infer(asked)
        assert (await values(model, text("cat", "cat"))).shape == (2, 16)

    statistics = run(tmp_path, test, config="max_batch_size: 2")
    assert statistics.success.count == 1


def test_reranker_takes_queries_and_texts(tmp_path) -> None:
    async def test(model) -> None:
        rows = [("cat", "cat"), ("cat", "dog")]
        got = await values(model, call("query", "text", rows=rows))
        assert got.shape == (2, 1)
        assert got[0] > got[1]
        expected = await model.task.rerank(rows, options=EncodeOptions())
        np.testing.assert_allclose(got, expected.values, atol=1e-6)
        with pytest.raises(InvalidRequest, match=r"missing required input\(s\) \['query'\]"):
            await model.infer(text("cat"))
        with pytest.raises(InvalidRequest, match="no parameter of a reranker"):
            await model.infer(call("query", "text", rows=rows, parameters={"prompt_name": "query"}))

    run(tmp_path, test, family="reranker")


def test_classifier_names_its_labels(tmp_path) -> None:
    async def test(model) -> None:
        assert model.outputs[0].shape == (-1, len(LABELS))
        assert model.labels("scores") == list(LABELS)
        assert model.labels("nothing") == []
        got = await values(model, text("a threat", "the sun"))
        assert got.argmax(axis=1)[0] == LABELS.index("threat")
        assert got[1].max() < 0.1

    run(tmp_path, test, family="classifier")


def test_many_strings_are_converted_all_the_same(tmp_path) -> None:
    async def test(model) -> None:
        got = await values(model, text(*["cat"] * 9000))
        assert got.shape == (9000, 1)

    run(tmp_path, test, size=4, family="classifier", labels=["threat"], config="max_batch_size: 10000")
