"""Our samplers against diffusers' schedulers, over whole schedules."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sardonyx.errors import InvalidRequest
from sardonyx.processing.samplers import guidance_embedding, make_sampler, noise_generator
from sardonyx.repository.scheduler_config import SAMPLER_NAMES, SchedulerConfig
from tests.processing.samplers.denoising import (
    SHAPE,
    assert_close,
    assert_same,
    model_for,
    normals,
    run_ours,
    run_theirs,
    theirs,
)

# diffusers reads torch's tensors with numpy, in a way that numpy 2 gives a warning for.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE_DIFFUSION: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NUM_STEPS = (1, 2, 4, 10, 20, 50)
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def config_of(**fields: Any) -> SchedulerConfig:
    return SchedulerConfig(sampler="ddim", **fields)


def compare(name: str, num_steps: int, fields: dict[str, Any], *, strength: float = 1.0, begins_with: Any = None) -> None:
    config = config_of(**fields)
    model = model_for(config)
    ours = run_ours(make_sampler(name, config, num_steps, strength=strength), model, seed=num_steps, image=begins_with)
    given = {"clip_sample": False} | fields
    reference = run_theirs(
        theirs(name, **given), model, num_steps, seed=num_steps, image=begins_with, strength=strength
    )
    assert_same(ours, reference)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_latents_are_those_of_diffusers(name: str, prediction: str, spacing: str) -> None:
    if (name, prediction) == ("euler_a", "sample"):
        pytest.skip("diffusers does not have it")
    fields = STABLE_DIFFUSION | {"prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 1}
    for num_steps in NUM_STEPS:
        compare(name, num_steps, fields)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_an_image_is_begun_with_as_in_diffusers(name: str, strength: float) -> None:
    for num_steps in (4, 10, 20):
        compare(name, num_steps, STABLE_DIFFUSION, strength=strength, begins_with=normals(1))


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_spacing_that_is_left_open_is_that_of_diffusers_class(name: str) -> None:
    compare(name, 10, STABLE_DIFFUSION)


CONFIGS = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.sampled_from([100, 250, 1000]),
        "beta_start": st.sampled_from([0.0001, 0.00085, 0.002]),
        "beta_end": st.sampled_from([0.012, 0.02]),
        "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
        "rescale_betas_zero_snr": st.booleans(),
        "prediction_type": st.sampled_from(PREDICTIONS),
        "timestep_spacing": st.sampled_from(SPACINGS),
        "steps_offset": st.integers(0, 2),
        "set_alpha_to_one": st.booleans(),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.5, 1.0]),
        "original_inference_steps": st.sampled_from([40, 50]),
        "timestep_scaling": st.sampled_from([0.01, 10.0]),
        "lower_order_final": st.booleans(),
        "euler_at_final": st.booleans(),
        "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        "lambda_min_clipped": st.sampled_from([None, -5.1, -2.0]),
    }
)


@settings(max_examples=150, deadline=None)
@given(CONFIGS, st.sampled_from(SAMPLER_NAMES), st.integers(1, 40), st.sampled_from([0.5, 1.0]))
def test_latents_are_those_of_diffusers_whatever_the_config(
    fields: dict[str, Any], name: str, num_steps: int, strength: float
) -> None:
    assume((name, fields["prediction_type"]) != ("euler_a", "sample"))
    # Without any signal diffusers' DDIM and LCM divide by zero here, ours do not.
    assume(not (name in ("ddim", "lcm") and fields["prediction_type"] == "epsilon" and fields["rescale_betas_zero_snr"]))
    if fields["lambda_min_clipped"] is None:
        theirs_fields = {key: value for key, value in fields.items() if key != "lambda_min_clipped"}
    else:
        # Clipped schedules may have fewer steps than were asked for, and diffusers then begins an image late.
        assume(not (name == "dpmpp_2m" and fields["timestep_spacing"] == "trailing" and strength < 1))
        theirs_fields = fields
    assume(int(num_steps * strength) > 0)
    config = config_of(**fields)
    model = model_for(config)
    image = normals(3) if strength < 1 else None
    ours = run_ours(make_sampler(name, config, num_steps, strength=strength), model, seed=7, image=image)
    reference = run_theirs(theirs(name, **theirs_fields), model, num_steps, seed=7, image=image, strength=strength)
    assert_same(ours, reference)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_an_image_is_kept_under_a_mask_as_in_diffusers(name: str) -> None:
    config = config_of(**STABLE_DIFFUSION)
    model, image, noise = model_for(config), normals(1), normals(2)
    sampler, scheduler = make_sampler(name, config, 8), theirs(name, **STABLE_DIFFUSION)
    seen: list[np.ndarray] = []
    latents = noise * sampler.init_noise_sigma
    while not sampler.is_done:
        seen.append(sampler.add_noise(image, noise))
        latents = sampler.step(model(sampler.scale_input(latents), sampler.timestep), latents, noise_generator(1))
    import torch

    scheduler.set_timesteps(8)
    for index, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.add_noise(torch.from_numpy(image)[None], torch.from_numpy(noise)[None], timestep[None])
        assert_close(seen[index], expected.numpy()[0], 1e-5)
    np.testing.assert_array_equal(sampler.add_noise(image, noise), image)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_what_a_model_predicts_makes_no_difference(name: str) -> None:
    """One model, told as noise, as velocity and as the clean image."""
    config = config_of(**STABLE_DIFFUSION)
    model = model_for(config)
    ways = []
    for prediction in PREDICTIONS:
        sampler = make_sampler(name, config_of(**STABLE_DIFFUSION, prediction_type=prediction), 10)

        def told(scaled: np.ndarray, timestep: float, sampler: Any = sampler, prediction: str = prediction) -> np.ndarray:
            noise = model(scaled, timestep)
            signal = sampler._signals[sampler.step_index]
            noise_level = (1 - signal**2) ** 0.5
            image = (scaled - noise_level * noise) / signal
            told = {"epsilon": noise, "sample": image, "v_prediction": signal * noise - noise_level * image}
            return told[prediction]

        ways.append(run_ours(sampler, told, seed=1))
    for way in ways[1:]:
        assert_close(way.latents, ways[0].latents, 1e-4)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_step_has_less_noise_than_the_one_before(name: str, spacing: Any) -> None:
    for num_steps in range(1, 51):
        sampler = make_sampler(name, config_of(**STABLE_DIFFUSION, timestep_spacing=spacing), num_steps)
        assert sampler.num_steps == num_steps
        assert (np.diff(sampler._noise_levels) < 0).all()
        assert (np.diff(sampler.timesteps) <= 0).all()
        if name != "dpmpp_2m_karras":  # as in diffusers, its timesteps are whole, and crowd near 0
            assert (np.diff(sampler.timesteps) < 0).all()


@pytest.mark.parametrize("num_steps", [61, 103, 121])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_trailing_schedules_have_no_step_too_many(name: str, num_steps: int) -> None:
    sampler = make_sampler(name, config_of(timestep_spacing="trailing"), num_steps)
    assert sampler.num_steps == num_steps
    assert sampler.timesteps[0] == 999
    assert sampler.timesteps[-1] > 0


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_the_last_step_ends_at_the_estimate(name: str) -> None:
    config = config_of(**STABLE_DIFFUSION)
    sampler = make_sampler(name, config, 6)
    way = run_ours(sampler, model_for(config), seed=1)
    assert_close(way.latents, way.estimates[-1], 1e-6)


@pytest.mark.parametrize(("name", "field"), [("ddim", "set_alpha_to_one"), ("euler", "final_sigmas_type")])
def test_the_last_step_keeps_some_noise_where_the_config_says_so(name: str, field: str) -> None:
    values: dict[str, Any] = {"set_alpha_to_one": False, "final_sigmas_type": "sigma_min"}
    config = config_of(**STABLE_DIFFUSION, **{field: values[field]})
    way = run_ours(make_sampler(name, config, 6), model_for(config), seed=1)
    assert 0.001 < np.abs(way.latents - way.estimates[-1]).max() < 0.5


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_images_that_are_made_together_are_those_made_alone(name: str) -> None:
    config = config_of(**STABLE_DIFFUSION)
    model = model_for(config)
    alone = [run_ours(make_sampler(name, config, n), model, seed=n).latents for n in (5, 8, 3)]
    rows = []
    for num_steps in (5, 8, 3):
        sampler, generator = make_sampler(name, config, num_steps), noise_generator(num_steps)
        rows.append([sampler, generator, generator.standard_normal(SHAPE, dtype=np.float32) * sampler.init_noise_sigma])
    output = np.empty(SHAPE, np.float32)  # one buffer for all, as sessions have
    while any(not sampler.is_done for sampler, _, _ in rows):
        for row in rows:
            sampler, generator, latents = row
            if not sampler.is_done:
                output[:] = model(sampler.scale_input(latents), sampler.timestep)
                row[2] = sampler.step(output, latents, generator)
    for row, expected in zip(rows, alone, strict=True):
        np.testing.assert_array_equal(row[2], expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_a_step_changes_nothing_that_it_is_given_nor_what_it_gave(name: str, prediction: Any) -> None:
    sampler = make_sampler(name, config_of(**STABLE_DIFFUSION, prediction_type=prediction), 4)
    output, latents, generator = normals(1), normals(2), noise_generator(3)
    first = sampler.step(output, latents, generator)
    kept_first, kept_x0 = first.copy(), sampler.x0.copy()
    np.testing.assert_array_equal(output, normals(1))
    np.testing.assert_array_equal(latents, normals(2))
    x0 = sampler.x0
    output[:] = 9
    sampler.step(normals(4), first, generator)
    np.testing.assert_array_equal(first, kept_first)
    np.testing.assert_array_equal(x0, kept_x0)


@pytest.mark.parametrize("name", SAMPLER_NAMES)
def test_noise_is_drawn_only_where_it_is_announced(name: str) -> None:
    sampler = make_sampler(name, config_of(**STABLE_DIFFUSION), 4)
    generator, latents = noise_generator(1), normals(2)
    draws = []
    while not sampler.is_done:
        before = generator.bit_generator.state["state"]["counter"].copy(), generator.bit_generator.state["buffer_pos"]
        draws.append(sampler.needs_noise)
        latents = sampler.step(normals(3), latents, generator)
        after = generator.bit_generator.state["state"]["counter"], generator.bit_generator.state["buffer_pos"]
        assert draws[-1] == bool((before[0] != after[0]).any() or before[1] != after[1])
    assert draws == ([True, True, True, False] if name in ("euler_a", "lcm") else [False] * 4)


@pytest.mark.parametrize("name", ["ddim", "lcm"])
def test_models_of_noise_survive_a_timestep_without_signal(name: str) -> None:
    config = config_of(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    way = run_ours(make_sampler(name, config, 4), model_for(config), seed=1)
    assert np.isfinite(way.latents).all()


def test_turbo_models_go_from_the_last_timestep_to_the_estimate_at_once() -> None:
    config = config_of(**STABLE_DIFFUSION, timestep_spacing="trailing")
    for name in ("euler", "euler_a"):
        sampler = make_sampler(name, config, 1)
        assert sampler.timesteps.tolist() == [999]
        assert sampler.init_noise_sigma == pytest.approx(14.6146, abs=1e-3)
        assert not sampler.needs_noise
        latents = normals(1) * sampler.init_noise_sigma
        image = sampler.step(normals(2), latents, noise_generator(1))
        np.testing.assert_allclose(image, latents - sampler.init_noise_sigma * normals(2), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "num_steps", "strength", "message"),
    [
        ("plms", 10, 1.0, "no sampler 'plms'; there are ddim, euler"),
        ("ddim", 0, 1.0, "from 1 to 1000"),
        ("ddim", 1001, 1.0, "from 1 to 1000"),
        ("lcm", 51, 1.0, "at most 50 steps with lcm"),
        ("dpmpp_2m", 1000, 1.0, "1000 steps are too many for dpmpp_2m"),
        ("euler", 10, 0.0, "strength has to be above 0"),
        ("euler", 10, 1.1, "strength has to be above 0"),
        ("euler", 10, float("nan"), "strength has to be above 0"),
        ("euler", 10, 0.09, "strength 0.09 of 10 steps leaves no step to run"),
    ],
)
def test_what_no_schedule_has_is_refused(name: str, num_steps: int, strength: float, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        make_sampler(name, config_of(**STABLE_DIFFUSION), num_steps, strength=strength)
    assert caught.value.param in ("sampler", "steps", "strength")


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_timesteps_behind_the_last_are_refused(name: str) -> None:
    config = config_of(timestep_spacing="leading", steps_offset=1)
    num_steps = 1000
    with pytest.raises(InvalidRequest, match="ask for fewer"):
        make_sampler(name, config, num_steps)


@settings(max_examples=100, deadline=None)
@given(CONFIGS, st.sampled_from(SAMPLER_NAMES), st.integers(1, 1000), st.floats(0.01, 1))
def test_a_schedule_is_made_or_refused(fields: dict[str, Any], name: str, num_steps: int, strength: float) -> None:
    try:
        sampler = make_sampler(name, config_of(**fields), num_steps, strength=strength)
    except InvalidRequest:
        return
    assert 0 <= sampler.timesteps[-1] <= sampler.timesteps[0] < fields["num_train_timesteps"]
    assert 1 <= sampler.num_steps <= num_steps


def test_guidance_is_told_as_in_diffusers() -> None:
    import torch
    from diffusers.pipelines.latent_consistency_models import pipeline_latent_consistency_text2img as pipeline

    embed = pipeline.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    for guidance_scale, width in [(1.0, 256), (8.0, 256), (3.5, 33)]:
        expected = embed(None, torch.tensor([guidance_scale - 1]), embedding_dim=width)[0].numpy()
        np.testing.assert_allclose(guidance_embedding(guidance_scale, width), expected, atol=2e-3)
