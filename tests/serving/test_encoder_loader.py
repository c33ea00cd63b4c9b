"""Encoder models from the folder to a version that serves, and what is refused."""

import asyncio

import numpy as np
import pytest
from tests.serving.encoder_serving import load
from tests.serving.version_folders import change_manifest
from tests.tiny_encoders import make_encoder_model, make_tokenizer
from tests.tiny_models import make_language_model

from sardonyx.errors import ConfigError, ModelNotReady
from sardonyx.metrics import Metrics
from sardonyx.serving.embeddings import EmbeddingModel
from sardonyx.serving.loader import build_registry
from sardonyx.serving.served import InferCall
from sardonyx.serving.tasks import EncodeOptions
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor


def refusal(root, **options) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(root, **options)
    return caught.value


def test_version_tells_what_it_is(tmp_path) -> None:
    folder = make_encoder_model(tmp_path, max_model_len=48, parameters={"max_model_len": "40"})
    loader, model = load(tmp_path)
    try:
        assert (model.name, model.version, model.created) == ("tiny", 1, 1767225600)
        assert model.size_bytes == sum((folder / name).stat().st_size for name in ("model.onnx", "tokenizer.json"))
        assert isinstance(model.task, EmbeddingModel)
        assert (model.task.max_model_len, model.task.size) == (40, 16)
        assert list(model.task.matryoshka_dims) == [4, 8]
        assert not model.task.allows_any_dimensions
        assert model.is_alive
        assert model.stalled_s == 0
        assert model.statistics.load_s > 0
    finally:
        model.discard()
        loader.close()
    assert not model.is_alive


def test_config_may_not_lengthen_what_the_graph_was_built_for(tmp_path) -> None:
    make_encoder_model(tmp_path, parameters={"max_model_len": "4096", "allow_any_dimensions": "true"})
    loader, model = load(tmp_path)
    assert model.task.max_model_len == 64
    assert model.task.allows_any_dimensions
    model.discard()
    loader.close()


@pytest.mark.parametrize("parameters", [{"num_instances": "1"}, {"num_instances": "3", "max_batch_size": "1"}, {}])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_any_number_of_instances_gives_the_same_embeddings(tmp_path, parameters, num_threads) -> None:
    make_encoder_model(tmp_path, parameters={"max_batch_tokens": "16", **parameters})

    async def main() -> None:
        loader, model = load(tmp_path, num_threads=num_threads)
        texts = ["cat", "dog sun moon " * 12, "paris is the capital"] * 5
        encoded = await model.task.embed(texts, options=EncodeOptions())
        np.testing.assert_allclose(encoded.values, np.tile(encoded.values[:3], (5, 1)), atol=1e-5)
        if parameters.get("max_batch_size") == "1":
            assert model.statistics.execution_count == 15
        await model.close()
        loader.close()

    asyncio.run(main())


def test_label_of_a_rule_that_the_model_does_not_have_is_refused(tmp_path) -> None:
    make_encoder_model(tmp_path, "a", family="classifier", parameters={"moderation.hatred": "hate 0.5"})
    make_encoder_model(tmp_path, "b", family="reranker", parameters={"moderation.relevance": "hate 0.5"})
    error = refusal(tmp_path, name="a")
    assert error.field == "parameters['moderation.hatred']"
    assert "labels are insult, threat, praise" in error.reason
    assert "a model of reranker has no labels" in refusal(tmp_path, name="b").reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target": "cuda"}, "was exported for cuda"),
        ({"encoder__vocab_size": 5}, "the graph was built for 5 tokens"),
        ({"family": "image_classifier"}, "is missing although family is"),
    ],
)
def test_manifest_that_does_not_suit_is_refused(tmp_path, fields, reason) -> None:
    change_manifest(make_encoder_model(tmp_path), **fields)
    assert reason in str(refusal(tmp_path))


def test_rows_without_room_for_a_text_are_refused(tmp_path) -> None:
    make_encoder_model(tmp_path, parameters={"max_model_len": "2"})
    error = refusal(tmp_path)
    assert error.field == "parameters['max_model_len']"
    assert "special tokens alone are 2" in error.reason


def test_graph_that_is_not_what_the_manifest_says_is_refused(tmp_path) -> None:
    change_manifest(make_encoder_model(tmp_path), encoder__output="other")
    refusal(tmp_path)


def test_missing_and_damaged_files_are_refused(tmp_path) -> None:
    (make_encoder_model(tmp_path, "a") / "tokenizer.json").unlink()
    (make_encoder_model(tmp_path, "b") / "model.onnx").write_bytes(b"")
    assert "tokenizer.json: is missing" in str(refusal(tmp_path, name="a"))
    assert "has 0 bytes" in str(refusal(tmp_path, name="b"))
    folder = make_language_model(tmp_path, "c")
    assert folder.name == "1"
    assert "is no encoder model" in str(refusal(tmp_path, name="c"))


def test_unknown_parameter_is_refused(tmp_path) -> None:
    make_encoder_model(tmp_path, parameters={"max_batch_token": "5"})
    assert "max_batch_token" in str(refusal(tmp_path))


def test_registry_serves_every_version_that_the_policy_chooses(tmp_path) -> None:
    make_encoder_model(tmp_path, "m", size=16, config="version_policy { all {} }")
    make_encoder_model(tmp_path, "m", size=8, version=3, config="version_policy { all {} }")
    make_encoder_model(tmp_path, "bad", family="classifier", parameters={"moderation.hatred": "hate 0.5"})
    asked = InferCall(inputs=[Tensor("text", "BYTES", np.array([[b"cat"]], object))])

    async def main() -> None:
        metrics = Metrics("test")
        settings = Settings(repository=tmp_path, num_threads=1, strict_readiness=False)
        registry = build_registry(settings, metrics)
        await registry.start()
        try:
            for version, size in ((1, 16), (3, 8), (None, 8)):
                answer = await registry.served("m", version).infer(asked)
                assert answer.outputs[0].array.shape == (1, size)
            with pytest.raises(ModelNotReady, match="hatred"):
                registry.served("bad")
            assert metrics.inference("m", 3).success.count == 2
            served = registry.served("m")
        finally:
            await registry.close()
        with pytest.raises(ModelNotReady):
            await served.infer(asked)

    asyncio.run(main())


def test_tokenizer_without_special_tokens_serves(tmp_path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.post_processor = None
    make_encoder_model(tmp_path, tokenizer=tokenizer)

    async def main() -> None:
        loader, model = load(tmp_path)
        encoded = await model.task.embed(["", "cat"], options=EncodeOptions())
        assert encoded.num_tokens == 2
        await model.close()
        loader.close()

    asyncio.run(main())
