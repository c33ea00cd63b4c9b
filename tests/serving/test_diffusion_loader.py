"""Image models from the folder to a version that serves, and what is refused."""

import asyncio
import json

import numpy as np
import pytest
from tests.serving.fake_tasks import FakeImageClassifier
from tests.serving.version_folders import change_manifest, parameter
from tests.tiny_diffusion import NOT_FINITE, SIDE, make_diffusion_model, mask_file, picture_file, pixels_of
from tests.tiny_encoders import make_encoder_model

from sardonyx.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    UnsupportedFeature,
)
from sardonyx.metrics import Metrics
from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository
from sardonyx.serving.diffusion_loader import DiffusionLoader
from sardonyx.serving.images import ImageModel
from sardonyx.serving.loader import build_registry
from sardonyx.serving.served import InferCall
from sardonyx.serving.tasks import ImageOptions
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor

LAYOUTS = ("sd", "sdxl", "lcm")


def no_judge(name):
    raise AssertionError("nobody is to judge")


def load(root, find_judge=no_judge, **options):
    settings = Settings(**({"repository": root, "num_threads": 2} | options))
    loader = DiffusionLoader(settings, Metrics("test"), find_judge)
    try:
        return loader, loader.load(Repository(root).entry("tiny"), 1)
    except BaseException:
        loader.close()
        raise


def run(root, test, find_judge=no_judge, **options):
    """A test on the model of a repository. Afterwards nothing may be admitted or in flight."""

    async def main():
        loader, model = load(root, find_judge, **options)
        try:
            await test(model)
            assert model.calls.num_active == model.statistics.num_pending == 0
            assert loader._admission.num_sequences == 0
        finally:
            await model.close()
            loader.close()
        return model

    return asyncio.run(main())


def refusal(root):
    with pytest.raises(ConfigError) as caught:
        load(root)
    return caught.value


async def paint(model, prompt="a cat", **options):
    call = await model.task.start(ImageOptions(prompt=prompt, **options), request_id=f"call-{prompt}-{id(options)}")
    return [each.pixels for each in await call.collect()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_version_tells_what_it_is(tmp_path, layout):
    folder = make_diffusion_model(tmp_path, layout=layout)
    assert check_repository(tmp_path) == []
    loader, model = load(tmp_path)
    try:
        assert (model.name, model.version, model.created) == ("tiny", 1, 1767225600)
        files = [each for each in folder.iterdir() if each.name != "manifest.json"]
        assert model.size_bytes == sum(each.stat().st_size for each in files)
        assert isinstance(model.task, ImageModel)
        assert model.task.size == (SIDE, SIDE)
        assert (model.task.default_steps, model.task.max_steps) == (4, 100)
        assert model.is_alive
        assert model.stalled_s == 0
        assert model.statistics.load_s > 0
        assert not model.is_decoupled
        assert model.labels("image") == []
    finally:
        model.discard()
        loader.close()
    assert not model.is_alive


def test_operator_decides_what_requests_get_that_say_nothing(tmp_path):
    config = f"{parameter('default_steps', '2')} {parameter('default_guidance', '1.5')}"
    make_diffusion_model(tmp_path, config=config)

    async def test(model):
        assert model.task.default_steps == 2
        (unsaid,), (said,) = await paint(model, seed=1), await paint(model, seed=1, steps=2, guidance=1.5)
        np.testing.assert_array_equal(unsaid, said)

    run(tmp_path, test)


def test_default_steps_stay_within_the_operators_limit(tmp_path):
    make_diffusion_model(tmp_path, config=parameter("max_steps", "3"))
    loader, model = load(tmp_path)
    model.discard()
    loader.close()
    assert model.task.default_steps == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_become_pictures(tmp_path, layout):
    make_diffusion_model(tmp_path, layout=layout)

    async def test(model):
        first, second = await paint(model, seed=1, n=2)
        assert first.shape == (SIDE, SIDE, 3)
        assert first.dtype == np.uint8
        assert not np.array_equal(first, second)
        (again,) = await paint(model, seed=2)
        np.testing.assert_array_equal(again, second)
        (small,) = await paint(model, size=(16, 24))
        assert small.shape == (16, 24, 3)

    run(tmp_path, test)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_at_once_get_what_they_get_alone(tmp_path, layout):
    make_diffusion_model(tmp_path, layout=layout, config=parameter("max_batch_rows", "5"))

    async def test(model):
        wishes = [
            {"prompt": f"cat {n % 3}", "seed": n, "steps": 2 + n % 5, "size": [(32, 32), (16, 32)][n % 2]}
            for n in range(10)
        ]
        wishes[3] |= {"source": picture_file(), "mask": mask_file()}
        wishes[6] |= {"guidance": 1.0}
        together = await asyncio.gather(*(paint(model, **each) for each in wishes))
        for wish, (among,) in zip(wishes, together, strict=True):
            (alone,) = await paint(model, **wish)
            assert np.abs(among.astype(int) - alone.astype(int)).max() <= 1
        assert model.calls.stats().generated_tokens > 0

    run(tmp_path, test)


def test_masked_picture_keeps_the_rest(tmp_path):
    make_diffusion_model(tmp_path)

    async def test(model):
        (image,) = await paint(model, source=picture_file(seed=3), mask=mask_file(), strength=1.0)
        before = pixels_of(picture_file(seed=3)).astype(int)
        assert np.abs(image[:, 16:] - before[:, 16:]).max() <= 1
        assert np.abs(image[:, :16] - before[:, :16]).mean() > 5

    run(tmp_path, test)


def test_previews_come_on_the_way(tmp_path):
    make_diffusion_model(tmp_path)

    async def test(model):
        call = await model.task.start(ImageOptions(prompt="a", steps=8, num_previews=3), request_id="call")
        updates = [(each.is_final, each.pixels.shape) async for each in call]
        assert updates == [(False, (8, 8, 3))] * 3 + [(True, (SIDE, SIDE, 3))]

    run(tmp_path, test)


def test_picture_that_is_not_finite_fails_and_others_go_on(tmp_path):
    make_diffusion_model(tmp_path, config=parameter("max_batch_rows", "8"))

    async def test(model):
        bad, good = await asyncio.gather(paint(model, f"a {NOT_FINITE}"), paint(model), return_exceptions=True)
        assert isinstance(bad, EngineError)
        assert "not finite" in bad.message
        assert good[0].shape == (SIDE, SIDE, 3)
        assert (await paint(model))[0].shape == (SIDE, SIDE, 3)

    model = run(tmp_path, test)
    assert model.statistics.success.count == 2


def test_model_without_encoder_for_pictures_and_without_previews_is_served(tmp_path):
    make_diffusion_model(tmp_path, has_vae_encoder=False, has_preview=False)

    async def test(model):
        assert len(await paint(model)) == 1
        for refused in ({"source": picture_file()}, {"num_previews": 1}):
            with pytest.raises(UnsupportedFeature):
                await paint(model, **refused)

    run(tmp_path, test)


def test_operators_limits_hold(tmp_path):
    lines = "\n".join([parameter("max_pixels", "1024"), parameter("max_steps", "6"), parameter("max_num_seqs", "1")])
    make_diffusion_model(tmp_path, config=lines)

    async def test(model):
        with pytest.raises(InvalidRequest, match="at most 6"):
            await paint(model, steps=7)
        with pytest.raises(InvalidRequest, match="at most 1,024"):
            await paint(model, size=(32, 40))
        assert len(await paint(model, steps=6, n=3)) == 3

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("lines", "field", "words"),
    [
        (parameter("max_num_seq", "3"), "max_num_seq", ""),
        (parameter("max_batch_rows", "0"), "max_batch_rows", ""),
        (parameter("max_steps", "many"), "max_steps", ""),
        ("max_batch_size: 4", "max_batch_size", "has no meaning for a diffusion model"),
    ],
)
def test_config_that_asks_for_what_is_not_there(tmp_path, lines, field, words):
    make_diffusion_model(tmp_path, config=lines)
    error = refusal(tmp_path)
    assert field in error.field
    assert words in error.message
    assert error.file.endswith("config.pbtxt")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"family": "whisper"}, "whisper"),
        ({"target": "cuda"}, "exported for cuda"),
        ({"diffusion__latent_channels": 16}, "not 16"),
        ({"diffusion__guidance_width": 8}, "is no unet"),
        ({"diffusion__size_multiple": 3}, "pixels_per_latent"),
    ],
)
def test_manifest_that_does_not_fit_the_graphs(tmp_path, fields, words):
    change_manifest(make_diffusion_model(tmp_path), **fields)
    assert words in str(refusal(tmp_path))


def test_model_of_another_family_is_none(tmp_path):
    make_encoder_model(tmp_path)
    assert "is no image model" in refusal(tmp_path).message


FILES = ["unet.onnx", "vae_decoder.onnx", "vae_encoder.onnx", "text_encoder.onnx", "tokenizer.json"]


@pytest.mark.parametrize("name", [*FILES, "scheduler_config.json", "manifest.json"])
def test_missing_file_is_named(tmp_path, name):
    (make_diffusion_model(tmp_path) / name).unlink()
    error = refusal(tmp_path)
    assert name in str(error) or "manifest" in str(error)


@pytest.mark.parametrize("name", [*FILES, "scheduler_config.json"])
def test_broken_file_is_no_surprise(tmp_path, name):
    path = make_diffusion_model(tmp_path) / name
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert refusal(tmp_path).message


def test_scheduler_config_that_the_manifest_does_not_list_is_needed_all_the_same(tmp_path):
    folder = make_diffusion_model(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change_manifest(folder, files=[each for each in manifest["files"] if "scheduler" not in each["path"]])
    (folder / "scheduler_config.json").unlink()
    assert "scheduler_config.json" in str(refusal(tmp_path))


# Tensors


def tensor(text, name="prompt"):
    return Tensor(name, "BYTES", np.array([text.encode()], dtype=np.object_))


def test_prompt_as_a_tensor_becomes_a_png(tmp_path):
    make_diffusion_model(tmp_path)

    async def test(model):
        parameters = {"seed": 4, "steps": "3", "width": 24, "height": 16, "sampler": "euler", "guidance_scale": 2.5}
        call = InferCall(inputs=[tensor("a cat"), tensor("dog", "negative_prompt")], parameters=parameters)
        answer = await model.infer(call)
        ((output),) = answer.outputs
        assert (output.name, output.datatype, output.array.shape) == ("image", "BYTES", (1,))
        (expected,) = await paint(
            model, negative_prompt="dog", seed=4, steps=3, size=(16, 24), sampler="euler", guidance=2.5
        )
        np.testing.assert_array_equal(pixels_of(output.array[0]), expected)
        streamed = [each async for each in model.stream(InferCall(inputs=[tensor("a cat")]))]
        assert [each.is_final for each in streamed] == [True]

    model = run(tmp_path, test)
    assert [each.name for each in model.config.input] == ["prompt", "negative_prompt"]
    assert [each.name for each in model.config.output] == ["image"]


@pytest.mark.parametrize(
    ("call", "kind", "param"),
    [
        (InferCall(inputs=[]), InvalidRequest, None),
        (InferCall(inputs=[tensor("a", "negative_prompt")]), InvalidRequest, None),
        (InferCall(inputs=[tensor("x" * 50)]), ContextLengthExceeded, "prompt"),
        (InferCall(inputs=[tensor("a")], outputs=["picture"]), InvalidRequest, None),
        (InferCall(inputs=[tensor("a")], parameters={"width": 32}), InvalidRequest, "width"),
        (InferCall(inputs=[tensor("a")], parameters={"width": 33, "height": 32}), InvalidRequest, "size"),
        (InferCall(inputs=[tensor("a")], parameters={"steps": 0}), InvalidRequest, "steps"),
        (InferCall(inputs=[tensor("a")], parameters={"sampler": "heun"}), InvalidRequest, "sampler"),
        (InferCall(inputs=[tensor("a")], parameters={"seed": -1}), InvalidRequest, "seed"),
        (InferCall(inputs=[tensor("a")], parameters={"n": 2}), InvalidRequest, "n"),
    ],
)
def test_tensors_that_make_no_sense_are_refused(tmp_path, call, kind, param):
    make_diffusion_model(tmp_path)

    async def test(model):
        with pytest.raises(kind) as caught:
            await model.infer(call)
        if param is not None:
            assert caught.value.param == param

    run(tmp_path, test)


def test_moderator_of_the_config_judges_tensors_too(tmp_path):
    make_diffusion_model(tmp_path, config=parameter("moderator", "open-nsfw"))
    judge = FakeImageClassifier("open-nsfw")
    asked = []

    def find(name):
        asked.append(name)
        return judge

    async def answer(images, *, timeout_s=None):
        return await FakeImageClassifier.classify_images(judge, [b"nude=0.9"], timeout_s=timeout_s)

    judge.classify_images = answer

    async def test(model):
        with pytest.raises(InvalidRequest) as caught:
            await model.infer(InferCall(inputs=[tensor("a cat")]))
        assert caught.value.code == "moderation_blocked"
        assert set(asked) == {"open-nsfw"}

    run(tmp_path, test, find)


# In a registry


def test_registry_loads_reloads_and_unloads_it(tmp_path):
    make_diffusion_model(tmp_path)
    settings = Settings(repository=tmp_path, num_threads=2, model_control_mode="explicit", load_model=("tiny",))
    families = frozenset({"diffusion"})

    async def main():
        registry = build_registry(settings, Metrics("test"))
        try:
            await registry.start(("tiny",))
            task = registry.newest(None, families, "image model").task
            call = await task.start(ImageOptions(prompt="a"), request_id="first")
            assert len(await call.collect()) == 1
            await registry.load("tiny")
            with pytest.raises(ModelNotReady):
                await task.start(ImageOptions(prompt="a"), request_id="second")
            again = registry.newest("tiny", families, "image model").task
            call = await again.start(ImageOptions(prompt="a"), request_id="third")
            assert len(await call.collect()) == 1
            await registry.unload("tiny")
            assert not again.calls.is_alive
        finally:
            await registry.close()

    asyncio.run(main())


def test_moderator_is_found_in_the_repository_and_its_absence_told(tmp_path):
    make_diffusion_model(tmp_path, config=parameter("moderator", "judge"))
    make_encoder_model(tmp_path, "judge", family="classifier")

    async def main():
        registry = build_registry(Settings(repository=tmp_path, num_threads=2), Metrics("test"))
        try:
            await registry.start(None)
            task = registry.newest("tiny", frozenset({"diffusion"}), "image model").task
            with pytest.raises(ModelNotReady, match="its config has no parameter moderation"):
                await task.start(ImageOptions(prompt="a"), request_id="call")
        finally:
            await registry.close()

    asyncio.run(main())
