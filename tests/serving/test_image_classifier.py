"""Image classifiers from the repository to the scores, on a real graph; loader, task and tensors."""

import asyncio
import io
import json

import numpy as np
import onnx
import pytest
from PIL import Image
from tests.serving.encoder_serving import assert_idle
from tests.tiny_encoders import COLOURS, make_encoder_model

from sardonyx.errors import ConfigError, DeadlineExceeded, EngineError, InvalidRequest, ModelNotReady, Overloaded
from sardonyx.metrics import Metrics
from sardonyx.repository.layout import Repository
from sardonyx.serving.image_classifier import ImageClassifier
from sardonyx.serving.image_loader import ImageClassifierLoader
from sardonyx.serving.loader import build_registry
from sardonyx.serving.served import InferCall
from sardonyx.serving.task_finder import TaskFinder
from sardonyx.serving.tasks import CategoryRule, ImageClassifyTask
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor, TensorMetadata


def picture(colour, size=(20, 10)):
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def expected(*colours):
    """Softmax of 8 times the mean of each channel."""
    powers = np.exp(8 * np.array(colours) / 255)
    return powers / powers.sum(axis=1, keepdims=True)


def load(root, version=1, **options):
    loader = ImageClassifierLoader(Settings(**({"repository": root, "num_threads": 2} | options)), Metrics("test"))
    return loader, loader.load(Repository(root).entry("tiny"), version)


def run(root, test, *, server=None, spoil=lambda _: None, **options):
    """Make a tiny model and run a test on it. Afterwards nothing may be admitted or in flight."""
    spoil(make_encoder_model(root, family="image_classifier", **options))

    async def main():
        loader, model = load(root, **(server or {}))
        try:
            await test(model)
            assert_idle(model)
            return model.statistics
        finally:
            await model.close()
            loader.close()

    return asyncio.run(main())


def refusal(root):
    with pytest.raises(ConfigError) as caught:
        load(root)
    return caught.value


def change_manifest(folder, field, **values):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest[field] |= values
    path.write_text(json.dumps(manifest))


def divide_by_mean(folder):
    """8 / 0 of a black picture, 8 of a white one. The file keeps its size."""
    model = onnx.load(folder / "model.onnx")
    (product,) = [node for node in model.graph.node if node.op_type == "Mul"]
    product.op_type = "Div"
    product.input[:] = ["eight", "mean"]
    onnx.save_model(model, folder / "model.onnx")


def test_each_picture_gets_scores_of_all_labels(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (30, 60, 90), (0, 0, 0)]

    async def test(model):
        assert isinstance(model.task, ImageClassifier)
        assert isinstance(model.task, ImageClassifyTask)
        assert list(model.task.labels) == list(COLOURS)
        encoded = await model.task.classify_images([picture(each) for each in colours])
        np.testing.assert_allclose(encoded.values, expected(*colours), atol=1e-5)
        assert encoded.values.dtype == np.float32
        assert encoded.num_tokens == 0

    statistics = run(tmp_path, test)
    assert (statistics.success.count, statistics.inference_count) == (1, 4)
    assert statistics.load_s > 0


@pytest.mark.parametrize("parameters", [{}, {"num_instances": "3"}, {"max_batch_size": "1"}, {"max_batch_size": "64"}])
def test_calls_at_the_same_time_get_their_own_scores(tmp_path, parameters):
    async def test(model):
        colours = [[(i * 12, j * 60, 100) for j in range(4)] for i in range(20)]
        asked = [model.task.classify_images([picture(each) for each in call]) for call in colours]
        for call, encoded in zip(colours, await asyncio.gather(*asked), strict=True):
            np.testing.assert_allclose(encoded.values, expected(*call), atol=1e-5)

    statistics = run(tmp_path, test, parameters=parameters)
    assert statistics.inference_count == 80
    most = int(parameters.get("max_batch_size", 8))
    assert 80 / most <= statistics.execution_count <= 80


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"no picture", "is no picture that can be read"),
        (picture("red")[:45], "is a damaged or incomplete picture"),
        (picture("red", (8_000, 1)), "is too long and narrow"),
    ],
    ids=["another format", "truncated", "narrow"],
)
def test_a_picture_that_cannot_be_read_is_named_by_its_index(tmp_path, bad, words):
    async def test(model):
        with pytest.raises(InvalidRequest) as caught:
            await model.task.classify_images([picture("red"), picture("blue"), bad, b""])
        assert caught.value.param == "images.2"
        assert caught.value.message.startswith(f"images.2: {words}")

    statistics = run(tmp_path, test, spoil=lambda folder: change_manifest(folder, "image", resize=[10]))
    assert statistics.inference_count == 0


def test_a_call_needs_a_picture(tmp_path):
    async def test(model):
        with pytest.raises(InvalidRequest) as caught:
            await model.task.classify_images([])
        assert caught.value.param == "images"

    run(tmp_path, test)


def test_a_number_that_is_not_finite_fails_its_call_alone(tmp_path):
    async def test(model):
        white, black, mixed = await asyncio.gather(
            *(
                model.task.classify_images(list(map(picture, each)))
                for each in (["white"], ["black"], ["white", "black"])
            ),
            return_exceptions=True,
        )
        np.testing.assert_allclose(white.values, [[1 / 3] * 3], atol=1e-6)
        for error in (black, mixed):
            assert isinstance(error, EngineError)
            assert "not finite" in error.message
        assert model.is_alive

    run(tmp_path, test, spoil=divide_by_mean)


def test_time_and_bytes_are_bounded(tmp_path):
    red = picture("red")
    needed = len(red) + 8 * 8 * 3 * 4

    async def test(model):
        with pytest.raises(DeadlineExceeded):
            await model.task.classify_images([red], timeout_s=0)
        async with model.calls.open(1):
            with pytest.raises(Overloaded, match="bytes of pictures"):
                await model.task.classify_images([red])
        assert len((await model.task.classify_images([red])).values) == 1

    run(tmp_path, test, server={"max_inflight_tensor_bytes": needed})


def test_unloading_ends_what_comes_later(tmp_path):
    async def test(model):
        await model.drain(1.0)
        with pytest.raises(ModelNotReady):
            await model.task.classify_images([picture("red")])

    run(tmp_path, test)


def test_pictures_over_kserve(tmp_path):
    async def test(model):
        assert model.inputs == (TensorMetadata(name="image", datatype="BYTES", shape=(-1, 1)),)
        assert model.outputs == (TensorMetadata(name="scores", datatype="FP32", shape=(-1, 3)),)
        assert model.labels("scores") == list(COLOURS)
        assert model.config.max_batch_size == 64
        array = np.empty((2, 1), object)
        array[:, 0] = [picture("red"), picture("blue")]
        answer = await model.infer(InferCall(inputs=[Tensor("image", "BYTES", array)]))
        np.testing.assert_allclose(answer.outputs[0].array, expected((255, 0, 0), (0, 0, 255)), atol=1e-5)
        many = np.empty((65, 1), object)
        many[:, 0] = [b""] * 65
        with pytest.raises(InvalidRequest, match="64"):
            await model.infer(InferCall(inputs=[Tensor("image", "BYTES", many)]))

    run(tmp_path, test)


def test_the_operator_says_how_many_pictures_a_call_may_have(tmp_path):
    async def test(model):
        assert model.config.max_batch_size == 2

    run(tmp_path, test, config="max_batch_size: 2")


def test_version_tells_what_it_is(tmp_path):
    folder = make_encoder_model(
        tmp_path, family="image_classifier", version=3, parameters={"moderation.red": "violence 0.5, sexual 0.9"}
    )
    loader, model = load(tmp_path, version=3)
    assert (model.name, model.version, model.created) == ("tiny", 3, 1767225600)
    assert model.size_bytes == (folder / "model.onnx").stat().st_size
    assert model.task.moderation == {"red": [CategoryRule("violence", 0.5), CategoryRule("sexual", 0.9)]}
    model.discard()
    loader.close()
    assert not model.is_alive


@pytest.mark.parametrize(
    ("field", "values", "named", "words"),
    [
        ("image", {"crop": [9, 8]}, "image.crop", "no more than [8, 8]"),
        ("image", {"resize": [20, 7]}, "image.crop", "no more than [20, 7]"),
        ("image", {"std": [1.0, 0.0, 1.0]}, "image.std", "has a 0"),
        ("image", {"name": "pixels"}, "graphs['model']", "'pixels' alone was expected"),
        ("image", {"layout": "NCHW"}, "graphs['model']", "takes 'image' with the shape"),
        ("labels", {"names": ["a", "b"]}, "graphs['model']", "gives 'result' with the shape"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(tmp_path, field, values, named, words):
    change_manifest(make_encoder_model(tmp_path, family="image_classifier"), field, **values)
    error = refusal(tmp_path)
    assert error.field == named
    assert words in error.reason


@pytest.mark.parametrize("key", ["max_batch_tokens", "max_model_len", "truncate", "allow_any_dimensions"])
def test_options_of_text_models_are_refused(tmp_path, key):
    make_encoder_model(tmp_path, family="image_classifier", parameters={key: "1"})
    error = refusal(tmp_path)
    assert error.field == f"parameters[{key!r}]"
    assert error.reason == "has no meaning for an image classifier"


def test_rules_for_unknown_labels_are_refused(tmp_path):
    make_encoder_model(tmp_path, family="image_classifier", parameters={"moderation.purple": "sexual 0.5"})
    error = refusal(tmp_path)
    assert error.field == "parameters['moderation.purple']"
    assert "its labels are red, green, blue" in error.reason


def test_models_of_other_families_are_refused(tmp_path):
    make_encoder_model(tmp_path, family="classifier")
    assert "is no image classifier" in refusal(tmp_path).reason


def test_models_for_other_devices_are_refused(tmp_path):
    folder = make_encoder_model(tmp_path, family="image_classifier")
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"target": "cuda"}))
    assert "was exported for cuda" in refusal(tmp_path).reason


def test_registry_serves_image_classifiers_beside_others(tmp_path):
    make_encoder_model(tmp_path, "pictures", family="image_classifier", parameters={"moderation.red": "violence 0.5"})
    make_encoder_model(tmp_path, "texts", family="classifier", parameters={"moderation.threat": "violence 0.5"})

    async def main():
        registry = build_registry(Settings(repository=tmp_path, num_threads=1), Metrics("test"))
        await registry.start()
        try:
            judges = {judge.name: judge for judge in TaskFinder(registry).judges()}
            assert set(judges) == {"pictures", "texts"}
            encoded = await judges["pictures"].classify_images([picture("red")])
            np.testing.assert_allclose(encoded.values, expected((255, 0, 0)), atol=1e-5)
        finally:
            await registry.close()

    asyncio.run(main())
