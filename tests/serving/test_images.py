"""Calls for pictures: what the engine is asked, what comes back, and that every call ends once."""

import asyncio

import numpy as np
import pytest
from tests.serving.fake_tasks import FakeClassifier, FakeImageClassifier
from tests.serving.image_serving import serving
from tests.tiny_diffusion import mask_file, picture_file

from sardonyx.core import FinishReason
from sardonyx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    Overloaded,
    RequestAborted,
    UnsupportedFeature,
)
from sardonyx.processing.samplers import noise_generator
from sardonyx.serving.admission import Admission
from sardonyx.serving.images import ImageLimits
from sardonyx.serving.tasks import ImageOptions, ImageTask, ImageUsage


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sd")


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sdxl")


def on(folder, test, **options):
    async def main():
        async with serving(folder, **options) as served:
            await test(served)

    asyncio.run(main())


async def start(served, *, id="call", prompt="a cat", **options):
    return await served.model.start(ImageOptions(prompt=prompt, **options), request_id=id)


async def settle():
    """What was delivered is read."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_model_is_an_image_task(folder):
    async def test(served):
        assert isinstance(served.model, ImageTask)
        assert (served.model.size, served.model.default_steps, served.model.max_steps) == ((32, 32), 4, 50)
        assert served.model.has_previews

    on(folder, test)


def test_call_asks_for_its_pictures_and_gives_them_by_index(folder):
    async def test(served):
        call = await start(served, n=3, seed=7)
        requests = served.engine.requests
        assert [each.id for each in requests] == ["call-0", "call-1", "call-2"]
        for index, request in enumerate(requests):
            picture = request.picture
            assert picture.size == (4, 8, 8)
            assert picture.sampler.num_steps == 4
            assert picture.guidance == 3.0
            assert picture.preview_steps == frozenset()
            assert picture.source is None
            assert picture.time_ids is None
            expected = noise_generator(7 + index).standard_normal(3)
            np.testing.assert_array_equal(picture.generator.standard_normal(3), expected)
        assert len({each.picture.sampler for each in requests}) == 3
        assert len({each.picture.prompt for each in requests}) == 1
        assert len({each.picture.negative for each in requests}) == 1
        for index in (2, 0, 1):
            served.engine.finish(f"call-{index}", index)
        updates = await call.collect()
        assert [(each.index, each.is_final, each.pixels[0, 0, 0]) for each in updates] == [
            (0, True, 0),
            (1, True, 1),
            (2, True, 2),
        ]
        assert call.finish_reason is FinishReason.STOP
        assert served.statistics.success.count == 1

    on(folder, test)


def test_call_tells_its_size_and_its_tokens(folder):
    async def test(served):
        call = await start(served, size=(16, 48))
        assert call.size == (16, 48)
        assert served.engine.requests[0].picture.size == (4, 4, 12)
        assert call.usage == ImageUsage(num_text_tokens=7, num_source_tokens=0, num_picture_tokens=48)
        call.abort()
        call = await start(served, source=picture_file())
        assert call.usage == ImageUsage(num_text_tokens=7, num_source_tokens=64, num_picture_tokens=64)
        call.abort()

    on(folder, test)


def test_drawn_seeds_differ(folder):
    async def test(served):
        call = await start(served, n=2)
        first, second = (each.picture.generator.standard_normal(4) for each in served.engine.requests)
        assert not np.array_equal(first, second)
        call.abort()

    on(folder, test)


def test_wishes_reach_the_sampler(folder):
    async def test(served):
        call = await start(served, steps=10, guidance=1.5, sampler="euler_a", num_previews=3)
        picture = served.engine.requests[0].picture
        assert picture.sampler.num_steps == 10
        assert picture.guidance == 1.5
        assert type(picture.sampler).__name__ == "EulerAncestral"
        assert picture.preview_steps == {3, 5, 8}
        call.abort()

    on(folder, test)


@pytest.mark.parametrize(
    ("num_steps", "num_previews", "steps"),
    [(1, 3, set()), (2, 3, {1}), (4, 3, {1, 2, 3}), (30, 1, {15}), (30, 2, {10, 20}), (30, 0, set())],
)
def test_previews_are_spread_evenly_and_come_before_the_end(folder, num_steps, num_previews, steps):
    async def test(served):
        call = await start(served, steps=num_steps, num_previews=num_previews)
        assert served.engine.requests[0].picture.preview_steps == steps
        call.abort()

    on(folder, test)


@pytest.mark.parametrize(("guidance", "has_negative"), [(0.0, False), (1.0, False), (1.1, True), (None, True)])
def test_second_row_is_for_guidance_only(folder, guidance, has_negative):
    async def test(served):
        call = await start(served, guidance=guidance, negative_prompt="dog")
        assert (served.engine.requests[0].picture.negative is not None) == has_negative
        call.abort()

    on(folder, test)


def test_negative_prompt_that_says_the_same_takes_no_second_row(folder):
    async def test(served):
        call = await start(served, prompt="", negative_prompt="")
        assert served.engine.requests[0].picture.num_rows == 1
        call.abort()

    on(folder, test)


def test_prompts_are_kept_with_their_encodings(folder):
    async def test(served):
        for prompt in ("a cat", "a dog", "a cat"):
            (await start(served, prompt=prompt)).abort()
        prompts = [each.picture.prompt for each in served.engine.requests]
        assert prompts[0] is prompts[2]
        assert prompts[0] is not prompts[1]
        assert len({id(each.picture.negative) for each in served.engine.requests}) == 1
        for number in range(100):
            (await start(served, prompt=f"number {number}", guidance=1.0)).abort()
        assert len(served.model._prompts) == 64
        (await start(served, prompt="a cat")).abort()
        assert served.engine.requests[-1].picture.prompt is not prompts[0]

    on(folder, test)


def test_sdxl_is_told_sizes_and_gets_zeros_for_an_empty_negative_prompt(xl_folder):
    async def test(served):
        call = await start(served, n=2, size=(16, 32))
        pictures = [each.picture for each in served.engine.requests]
        assert pictures[0].time_ids == (16, 32, 0, 0, 16, 32)
        assert pictures[0].negative.is_zeroed
        assert pictures[0].negative is pictures[1].negative
        assert [len(ids) for ids in pictures[0].prompt.token_ids] == [24, 24]
        assert pictures[0].prompt.token_ids[1][-1] == 0
        call.abort()
        call = await start(served, negative_prompt="dog")
        assert not served.engine.requests[-1].picture.negative.is_zeroed
        call.abort()

    on(xl_folder, test, layout="sdxl")


def test_models_with_embedded_guidance_have_one_row_and_no_negative_prompt(tmp_path):
    async def test(served):
        call = await start(served, guidance=8.0)
        assert served.engine.requests[0].picture.num_rows == 1
        assert served.engine.requests[0].picture.guidance == 8.0
        call.abort()
        with pytest.raises(UnsupportedFeature, match="takes no negative prompt") as caught:
            await start(served, negative_prompt="dog")
        assert caught.value.param == "negative_prompt"

    on(tmp_path, test, layout="lcm")


# Pictures to begin with


def test_source_and_mask_are_read_once_for_all_pictures(folder):
    async def test(served):
        call = await start(served, n=2, source=picture_file(), mask=mask_file(), strength=0.5, steps=10)
        first, second = (each.picture for each in served.engine.requests)
        assert first.source is second.source
        assert first.source.pixels.shape == (3, 32, 32)
        np.testing.assert_array_equal(first.source.mask[0], [1, 1, 1, 1, 0, 0, 0, 0])
        assert first.sampler.num_steps == 5
        call.abort()

    on(folder, test)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, (32, 32)),
        (500, 500, (32, 32)),
        (100, 200, (24, 48)),
        (200, 100, (48, 24)),
        (10, 1000, (16, 56)),
        (1000, 10, (56, 16)),
    ],
)
def test_size_follows_the_picture_where_nobody_asks_for_one(folder, height, width, size):
    async def test(served):
        call = await start(served, source=picture_file(height, width))
        assert call.size == size
        assert served.engine.requests[0].picture.source.pixels.shape == (3, *size)
        call.abort()
        call = await start(served, source=picture_file(height, width), size=(16, 16))
        assert call.size == (16, 16)
        call.abort()

    on(folder, test)


def test_size_that_follows_the_picture_stays_below_the_operators_limit(folder):
    async def test(served):
        call = await start(served, source=picture_file(100, 200))
        assert call.size == (32, 32)
        call.abort()

    limits = ImageLimits(max_pixels=32 * 32, max_steps=50, timeout_s=60, queue_timeout_s=60)
    on(folder, test, limits=limits)


# Refusals


@pytest.mark.parametrize(
    ("options", "kind", "param", "words"),
    [
        ({"size": (32, 36)}, InvalidRequest, "size", "is 36x32; width and height of tiny are multiples of 8"),
        ({"size": (4, 32)}, InvalidRequest, "size", "multiples of 8"),
        ({"size": (64, 72)}, InvalidRequest, "size", "72x64 has 4,608 pixels; tiny makes at most 4,096"),
        ({"steps": 51}, InvalidRequest, "steps", "at most 50"),
        ({"sampler": "heun"}, InvalidRequest, "sampler", "no sampler 'heun'"),
        ({"prompt": "x" * 30}, ContextLengthExceeded, "prompt", "32 tokens"),
        ({"negative_prompt": "x" * 30}, ContextLengthExceeded, "negative_prompt", "32 tokens"),
        ({"source": b"no picture"}, InvalidRequest, "image", "image: is no picture"),
        ({"source": picture_file(), "mask": b"no picture"}, InvalidRequest, "mask", "mask: is no picture"),
        ({"source": picture_file(), "strength": 0.01}, InvalidRequest, "strength", "leaves no step"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(folder, options, kind, param, words):
    async def test(served):
        with pytest.raises(kind) as caught:
            await start(served, **options)
        assert caught.value.param == param
        assert words in caught.value.message
        assert not served.engine.requests
        served.assert_idle()
        assert not served.statistics.failures

    on(folder, test)


def test_model_without_previews_gives_none(folder):
    async def test(served):
        with pytest.raises(UnsupportedFeature) as caught:
            await start(served, num_previews=1)
        assert caught.value.param == "partial_images"

    on(folder, test, has_preview=False)


def test_model_without_an_encoder_for_pictures_begins_with_none(folder):
    async def test(served):
        with pytest.raises(UnsupportedFeature) as caught:
            await start(served, source=picture_file())
        assert caught.value.param == "image"

    on(folder, test, has_vae_encoder=False)


def test_full_queue_refuses_before_anything_is_read(folder):
    async def test(served):
        call = await start(served, n=2, steps=10)
        assert (served.admission.num_sequences, served.admission.num_tokens) == (2, 20)
        with pytest.raises(Overloaded):
            await start(served, steps=10, source=b"not even looked at")
        second = await start(served, id="other", steps=5)
        call.abort()
        second.abort()

    on(folder, test, admission=Admission(64, 25))


# Ends


def test_aborted_call_ends_its_pictures(folder):
    async def test(served):
        call = await start(served, n=2)
        served.engine.finish("call-0")
        await settle()
        call.abort()
        call.abort()
        assert served.engine.aborted == ["call-1"]
        with pytest.raises(RequestAborted):
            await call.collect()
        assert call.finish_reason is FinishReason.CANCELLED

    on(folder, test)


def test_left_iteration_ends_the_call(folder):
    async def test(served):
        call = await start(served, num_previews=1)
        served.engine.preview("call-0")
        task = asyncio.create_task(call.collect())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert served.engine.aborted == ["call-0"]

    on(folder, test)


def test_previews_and_pictures_come_in_order(folder):
    async def test(served):
        call = await start(served, n=2, num_previews=2)
        served.engine.preview("call-1", 5)
        served.engine.preview("call-0", 6)
        served.engine.finish("call-1", 7)
        served.engine.preview("call-0", 8)
        served.engine.finish("call-0", 9)
        updates = [(each.index, each.is_final, each.pixels[0, 0, 0]) async for each in call]
        assert updates == [(1, False, 5), (0, False, 6), (1, True, 7), (0, False, 8), (0, True, 9)]

    on(folder, test)


@pytest.mark.parametrize(
    ("reason", "error", "is_bare", "kind", "words"),
    [
        (FinishReason.ERROR, "it is not finite", False, EngineError, "it is not finite"),
        (FinishReason.CANCELLED, "deadline", False, DeadlineExceeded, "time was over"),
        (FinishReason.CANCELLED, "queue", False, Overloaded, "no slot"),
        (FinishReason.CANCELLED, None, True, EngineDead, "engine stopped"),
        (FinishReason.ERROR, None, True, EngineError, "failed"),
    ],
)
def test_picture_that_fails_takes_the_others_of_its_call_along(folder, reason, error, is_bare, kind, words):
    async def test(served):
        call = await start(served, n=3)
        served.engine.finish("call-1")
        served.engine.end("call-0", reason, error, is_bare=is_bare)
        with pytest.raises(kind, match=words):
            await call.collect()
        assert "call-2" in served.engine.aborted
        assert served.statistics.success.count == 0

    on(folder, test)


def test_engine_that_takes_none_ends_the_call_once(folder):
    async def test(served):
        served.engine.refuses_after = 1
        with pytest.raises(EngineDead):
            await start(served, n=3)
        assert "call-0" in served.engine.aborted
        served.assert_idle()

    on(folder, test)


def test_step_that_hangs_is_not_waited_for_beyond_the_deadline(folder):
    async def test(served):
        served.later_s = 60  # the time is over as soon as the engine has the picture
        call = await start(served)
        with pytest.raises(DeadlineExceeded):
            await call.collect()
        assert served.engine.aborted == ["call-0"]

    on(folder, test)


@pytest.mark.parametrize(("timeout_s", "expected_s"), [(None, 60), (7.0, 7), (900.0, 60)])
def test_engine_is_told_the_deadline(folder, timeout_s, expected_s):
    async def test(served):
        before_s = served.dispatch.clock()
        call = await start(served, timeout_s=timeout_s)
        request = served.engine.requests[0]
        assert request.deadline_s - before_s == pytest.approx(expected_s, abs=2)
        assert request.start_by_s - before_s == pytest.approx(60, abs=2)
        call.abort()

    on(folder, test)


def test_closed_model_ends_its_calls(folder):
    async def test(served):
        call = await start(served)
        await served.calls.close()
        with pytest.raises(ModelNotReady):
            await call.collect()
        assert served.engine.is_closed

    on(folder, test)


def test_model_that_is_closed_while_a_call_is_prepared_serves_none(folder, monkeypatch):
    async def test(served):
        read = served.model._tokens

        def close(text, param):
            asyncio.run_coroutine_threadsafe(served.calls.close(), loop).result()
            return read(text, param)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(served.model, "_tokens", close)
        with pytest.raises(ModelNotReady):
            await start(served)
        assert not served.engine.requests

    on(folder, test)


# Moderation


def picture_says(judge, text):
    """Whatever the picture, the judge reads this."""
    ask = judge.classify_images

    async def classify_images(images, *, timeout_s=None):
        assert all(each.startswith(b"\x89PNG") for each in images)
        return await ask([text.encode()] * len(images), timeout_s=timeout_s)

    judge.classify_images = classify_images
    return judge


def test_picture_that_is_not_flagged_is_given_out(folder):
    judge = picture_says(FakeImageClassifier("judge"), "nude=0.4")

    async def test(served):
        call = await start(served, n=2)
        for index in range(2):
            served.engine.finish(f"call-{index}")
        assert len(await call.collect()) == 2
        assert len(judge.calls) == 2
        assert 0 < judge.options[-1].timeout_s <= 60

    on(folder, test, judge=lambda name: judge)


@pytest.mark.parametrize("is_preview", [False, True])
def test_flagged_picture_ends_the_call(folder, is_preview):
    judge = picture_says(FakeImageClassifier("judge"), "nude=0.6")

    async def test(served):
        call = await start(served, n=2, num_previews=1)
        (served.engine.preview if is_preview else served.engine.finish)("call-0")
        with pytest.raises(InvalidRequest) as caught:
            await anext(aiter(call))
        assert caught.value.code == "moderation_blocked"
        assert "call-1" in served.engine.aborted

    on(folder, test, judge=lambda name: judge)


def test_without_its_moderator_a_model_takes_no_calls(folder):
    async def test(served):
        with pytest.raises(ModelNotReady, match="gives out nothing without its moderator"):
            await start(served)
        assert not served.engine.requests

    def missing(name):
        assert name == "judge"
        raise ModelNotFound(f"no model {name!r}")

    on(folder, test, judge=missing)
    on(folder, test, judge=lambda name: FakeClassifier("judge"))


def test_picture_that_cannot_be_judged_is_not_given_out(folder):
    judge = FakeImageClassifier("judge")
    judge.error = EngineError("it broke")

    async def test(served):
        call = await start(served)
        served.engine.finish("call-0")
        with pytest.raises(EngineError):
            await call.collect()

    on(folder, test, judge=lambda name: judge)
