"""`DiffusionRunner` over tiny graphs that depend on every input, against one picture at a time and the formulas."""

import msgspec
import numpy as np
import onnx
import pytest
from tests.tiny_diffusion import (
    GUIDANCE_WIDTH,
    NOT_FINITE,
    POOLED_WIDTH,
    PREVIEW,
    SIDE,
    WIDTH,
    WIDTH_2,
    make_diffusion_model,
    make_facts,
    make_graphs,
    make_tokenizer,
    picture_file,
    pixels_of,
)

from sardonyx.core import Sequence
from sardonyx.diffusion import DenoiseBatch, DenoiseRow, EncodedPrompt, ImageRequest, Picture, Prompt, SourceImage
from sardonyx.errors import ConfigError, EngineError
from sardonyx.processing.picture import read_source
from sardonyx.processing.samplers import guidance_embedding, make_sampler, noise_generator
from sardonyx.repository.scheduler_config import SAMPLER_NAMES, read_scheduler_config
from sardonyx.runners.diffusion import NOT_FINITE as NOT_FINITE_ERROR
from sardonyx.runners.diffusion import DiffusionRunner, DiffusionSessions
from sardonyx.runtime.session import KeptInputs, open_session

LAYOUTS = ("sd", "sdxl", "lcm")
LATENTS = (4, 8, 8)


class OneRound:
    """A sampler of one round that keeps what the model gave, guidance applied."""

    init_noise_sigma = 2.0

    def __init__(self, timestep=500.0):
        self.timestep = timestep
        self.num_steps = 1
        self.step_index = 0
        self.x0 = None
        self.output = None

    @property
    def is_done(self):
        return self.step_index == 1

    def scale_input(self, latents):
        return latents * np.float32(0.5)

    def step(self, model_output, latents, generator):
        self.output = model_output.copy()
        self.x0 = latents - model_output
        self.step_index += 1
        return self.x0

    def add_noise(self, image, noise):
        return image if self.is_done else image + noise


class Model:
    """A layout's graphs, opened."""

    def __init__(self, root, layout):
        self.folder = make_diffusion_model(root, layout=layout)
        self.facts = make_facts(layout)
        self.sessions = open_sessions(self.folder, self.facts)
        self.runner = DiffusionRunner(self.sessions, self.facts)
        self.scheduler = read_scheduler_config((self.folder / "scheduler_config.json").read_bytes())

    def prompt(self, text="a cat", *, is_zeroed=False):
        ids = make_tokenizer().encode(text).ids
        length = self.facts.encoders[0].max_tokens
        rows = tuple(ids + [each.pad_token_id] * (length - len(ids)) for each in self.facts.encoders)
        return Prompt(rows, is_zeroed=is_zeroed)

    def picture(self, text="a cat", *, seed=0, steps=4, sampler=None, negative="", guidance=3.0, strength=1.0, **more):
        has_negative = negative is not None and self.facts.guidance_width is None
        values = {
            "prompt": self.prompt(text),
            "negative": self.prompt(negative) if has_negative else None,
            "guidance": guidance,
            "size": LATENTS,
            "generator": noise_generator(seed),
            "time_ids": (SIDE, SIDE, 0, 0, SIDE, SIDE) if self.facts.pooled_width else None,
        }
        if not isinstance(sampler, OneRound):
            name = sampler or self.scheduler.sampler
            sampler = make_sampler(name, self.scheduler, steps, strength=strength)
        return Picture(sampler=sampler, **values | more)

    def begin(self, *pictures):
        """Encode what they need."""
        prompts = [each for picture in pictures for each in (picture.prompt, picture.negative)]
        new = list({each: None for each in prompts if each is not None and each.encoded is None})
        if new:
            self.runner.execute(DenoiseBatch(prompts=new))
        for picture in pictures:
            if picture.source is not None and picture.source.latents is None:
                self.runner.execute(DenoiseBatch(source=picture.source))

    def round(self, *pictures):
        return self.runner.execute(DenoiseBatch(rows=[row(each) for each in pictures]))

    def decode(self, *pictures):
        return self.runner.execute(DenoiseBatch(finished=[row(each) for each in pictures]))

    def make(self, *pictures):
        """Together as long as they last; the pixels of each."""
        self.begin(*pictures)
        while running := [each for each in pictures if not each.sampler.is_done]:
            assert not self.round(*running).failed
        return self.decode(*pictures).images


def row(picture):
    request = ImageRequest(id="x", prompt_ids=[0], picture=picture)
    return DenoiseRow(Sequence(request, 0, 0.0), picture)


def open_sessions(folder, facts):
    def opened(role):
        path = folder / f"{role}.onnx"
        return open_session(path, model_name="tiny") if path.exists() else None

    encoders = [opened(each.graph) for each in facts.encoders]
    return DiffusionSessions(encoders, opened("unet"), opened("vae_decoder"), opened("vae_encoder"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {layout: Model(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def model(models, request):
    return models[request.param]


@pytest.fixture
def sd(models):
    return models["sd"]


@pytest.mark.parametrize("sampler", SAMPLER_NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_together_are_what_they_are_alone(models, layout, sampler):
    model = models[layout]

    def pictures():
        return [
            model.picture("a cat", seed=1, steps=4, sampler=sampler),
            model.picture("dogs!", seed=2, steps=7, sampler=sampler, guidance=1.5, negative="a cat"),
            model.picture("a cat", seed=3, steps=5, sampler=sampler, negative=None),
        ]

    together = pictures()
    model.make(*together)
    for alone, among in zip(pictures(), together, strict=True):
        model.make(alone)
        np.testing.assert_allclose(among.latents, alone.latents, atol=1e-5)


def test_prompts_cross_to_the_device_when_a_picture_joins_or_leaves_and_not_in_between(model, monkeypatch):
    kept = []
    keep = KeptInputs.keep

    def count(self, name, array):
        kept.append((name, len(array)))
        keep(self, name, array)

    monkeypatch.setattr(KeptInputs, "keep", count)

    def crossed(*pictures):
        kept.clear()
        model.round(*pictures)
        return sorted(kept)

    first, second = model.picture("a cat", seed=1), model.picture("dogs!", seed=2)
    model.begin(first, second)
    names = set(model.sessions.unet.inputs) - {"sample", "timestep"}
    assert crossed(first) == sorted((name, first.num_rows) for name in names)
    assert crossed(first) == []
    assert crossed(first, second) == sorted((name, 2 * first.num_rows) for name in names)
    assert crossed(first, second) == []
    assert crossed(second) == sorted((name, second.num_rows) for name in names)
    second.guidance += 1
    assert bool(crossed(second)) is True


def test_same_seed_is_the_same_picture_and_another_is_another(model):
    first, again, other = model.picture(seed=1), model.picture(seed=1), model.picture(seed=2)
    model.make(first, again, other)
    np.testing.assert_array_equal(first.latents, again.latents)
    assert np.abs(first.latents - other.latents).max() > 1e-3


def test_noise_is_scaled_as_the_sampler_begins(sd):
    picture = sd.picture(sampler=OneRound(), seed=5)
    sd.begin(picture)
    sd.round(picture)
    noise = noise_generator(5).standard_normal(LATENTS, dtype=np.float32)
    np.testing.assert_allclose(picture.latents, 2 * noise - picture.sampler.output, atol=1e-6)


def test_rows_are_what_the_unet_is_given(model):
    """Every input by hand: two pictures with different timesteps, guided where the model has it."""
    pictures = [
        model.picture("a cat", sampler=OneRound(900.0), seed=1, guidance=4.0, negative="dog"),
        model.picture("tree", sampler=OneRound(100.0), seed=2, guidance=2.0, negative=None),
    ]
    model.begin(*pictures)
    noises = [noise_generator(seed).standard_normal(LATENTS, dtype=np.float32) for seed in (1, 2)]
    model.round(*pictures)
    for picture, noise in zip(pictures, noises, strict=True):

        def run(prompt, picture=picture, noise=noise):
            inputs = {
                "sample": noise[None],  # 2 as init_noise_sigma, 0.5 by scale_input
                "timestep": np.array([picture.sampler.timestep], np.float32),
                "encoder_hidden_states": prompt.encoded.hidden[None],
            }
            if model.facts.pooled_width:
                inputs["text_embeds"] = prompt.encoded.pooled[None]
                inputs["time_ids"] = np.array([picture.time_ids], np.float32)
            if model.facts.guidance_width:
                inputs["timestep_cond"] = guidance_embedding(picture.guidance, GUIDANCE_WIDTH)[None]
            return model.sessions.unet.run(inputs)["noise_pred"][0]

        expected = run(picture.prompt)
        if picture.negative is not None:
            negative = run(picture.negative)
            expected = negative + picture.guidance * (expected - negative)
        np.testing.assert_allclose(picture.sampler.output, expected, atol=1e-5)


def test_guidance_of_distilled_models_is_an_input(models):
    weak, strong = (models["lcm"].picture(sampler=OneRound(), guidance=each) for each in (1.0, 8.0))
    models["lcm"].begin(weak, strong)
    models["lcm"].round(weak, strong)
    assert (weak.num_rows, strong.num_rows) == (1, 1)
    assert np.abs(weak.sampler.output - strong.sampler.output).max() > 1e-4


def test_size_is_an_input_of_sdxl(models):
    small, large = (
        models["sdxl"].picture(sampler=OneRound(), time_ids=(side, side, 0, 0, side, side)) for side in (32, 512)
    )
    models["sdxl"].begin(small, large)
    models["sdxl"].round(small, large)
    assert np.abs(small.sampler.output - large.sampler.output).max() > 1e-3


def test_encodings_of_both_encoders_lie_side_by_side(models):
    model = models["sdxl"]
    prompt, other = model.prompt("a cat"), model.prompt("a dog")
    model.runner.execute(DenoiseBatch(prompts=[prompt, other]))
    alone = model.prompt("a cat")
    model.runner.execute(DenoiseBatch(prompts=[alone]))
    ids = [np.array([each]) for each in prompt.token_ids]
    first = model.sessions.encoders[0].run({"input_ids": ids[0]})
    second = model.sessions.encoders[1].run({"input_ids": ids[1]})
    expected = np.concatenate([first["hidden"][0], second["hidden"][0]], axis=-1)
    assert expected.shape[-1] == WIDTH + WIDTH_2
    np.testing.assert_array_equal(prompt.encoded.hidden, expected)
    np.testing.assert_allclose(prompt.encoded.pooled, second["pooled"][0], atol=1e-6)
    np.testing.assert_allclose(alone.encoded.pooled, prompt.encoded.pooled, atol=1e-6)


def test_zeroed_prompt_is_all_zeros(models):
    prompt, zeroed = models["sdxl"].prompt(""), models["sdxl"].prompt("", is_zeroed=True)
    models["sdxl"].runner.execute(DenoiseBatch(prompts=[zeroed, prompt]))
    assert zeroed.encoded.hidden.shape == prompt.encoded.hidden.shape
    assert not zeroed.encoded.hidden.any()
    assert not zeroed.encoded.pooled.any()
    assert zeroed.encoded.pooled.shape == (POOLED_WIDTH,)
    assert prompt.encoded.hidden.any()


def source_of(data, mask=None):
    return SourceImage(read_source(data, SIDE, SIDE), mask)


def test_picture_to_begin_with_comes_back_where_little_is_given_up(model):
    # With as little noise as the schedule has, what the decoder gives is the source.
    picture = model.picture(
        steps=50, strength=0.02, sampler="ddim", negative=None, source=source_of(picture_file(seed=4))
    )
    (image,) = model.make(picture)
    difference = np.abs(image.astype(int) - pixels_of(picture_file(seed=4)).astype(int))
    assert difference.mean() < 20
    strong = model.picture(steps=50, strength=1.0, sampler="ddim", negative=None, source=picture.source)
    (image,) = model.make(strong)
    assert np.abs(image.astype(int) - pixels_of(picture_file(seed=4)).astype(int)).mean() > difference.mean()


def test_source_begins_under_the_pictures_own_noise(sd):
    source = source_of(picture_file())
    first, second = (sd.picture(sampler=OneRound(), seed=seed, source=source) for seed in (1, 2))
    sd.begin(first, second)
    sd.round(first, second)
    for seed, picture in ((1, first), (2, second)):
        noise = noise_generator(seed).standard_normal(LATENTS, dtype=np.float32)
        np.testing.assert_array_equal(picture.noise, noise)
        np.testing.assert_allclose(picture.latents + picture.sampler.output, source.latents + noise, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "dpmpp_2m_karras", "lcm"])
def test_mask_keeps_the_picture_and_the_rest_changes(sd, sampler):
    mask = np.zeros((8, 8), np.float32)
    mask[:, :4] = 1
    data = picture_file(seed=9)
    picture = sd.picture(sampler=sampler, source=source_of(data, mask))
    (image,) = sd.make(picture)
    wanted = pixels_of(data).astype(int)
    assert np.abs(image[:, 16:].astype(int) - wanted[:, 16:]).max() <= 1
    assert np.abs(image[:, :16].astype(int) - wanted[:, :16]).mean() > 10


def test_what_a_mask_keeps_is_as_noisy_as_the_rest(sd):
    mask = np.zeros((8, 8), np.float32)
    picture = sd.picture(sampler="euler", steps=4, source=source_of(picture_file(), mask))
    sd.begin(picture)
    sd.round(picture)
    expected = picture.sampler.add_noise(picture.source.latents, picture.noise)
    np.testing.assert_allclose(picture.latents, expected, atol=1e-6)
    assert np.abs(picture.latents - picture.source.latents).max() > 0.5


def test_previews_are_of_the_clean_latents(sd):
    picture = sd.picture(sampler="euler", steps=4, preview_steps=frozenset({2}))
    plain = sd.picture(sampler="euler", steps=4, seed=1)
    sd.begin(picture, plain)
    assert sd.round(picture, plain).previews == {}
    previews = sd.round(plain, picture).previews
    assert list(previews) == [1]
    weights = np.array(PREVIEW, np.float32)
    colours = np.einsum("cyx,cd->yxd", picture.sampler.x0, weights[:4]) + weights[4]
    expected = (colours.clip(0, 1) * 255).round()
    assert previews[1].dtype == np.uint8
    assert np.abs(previews[1] - expected).max() <= 1


def test_no_previews_where_the_model_has_none(sd):
    facts = msgspec.structs.replace(sd.facts, preview=[])
    runner = DiffusionRunner(sd.sessions, facts)
    picture = sd.picture(preview_steps=frozenset({1}))
    sd.begin(picture)
    assert runner.execute(DenoiseBatch(rows=[row(picture)])).previews == {}


def test_picture_that_is_not_finite_fails_alone(model):
    pictures = [model.picture(seed=1), model.picture(f"a {NOT_FINITE}", seed=2), model.picture(seed=3)]
    model.begin(*pictures)
    assert model.round(*pictures).failed == {1: NOT_FINITE_ERROR}
    rest = [pictures[0], pictures[2]]
    model.make(*rest)
    again = model.picture(seed=3)
    model.make(again)
    np.testing.assert_allclose(rest[1].latents, again.latents, atol=1e-5)


def test_decoded_picture_that_is_not_finite_fails_alone(sd):
    pictures = [sd.picture(seed=1), sd.picture(seed=2)]
    sd.make(*pictures)
    pictures[0].latents[0, 0, 0] = np.nan
    output = sd.decode(*pictures)
    assert output.failed == {0: NOT_FINITE_ERROR}
    assert len(output.images) == 2


def test_pixels_are_the_decoders_colours(sd):
    picture = sd.picture()
    picture.latents = np.zeros(LATENTS, np.float32)
    picture.latents[0] = 0.5
    picture.latents[1] = -9
    picture.latents[2] = 9
    (image,) = sd.decode(picture).images
    assert image.shape == (SIDE, SIDE, 3)
    assert image.dtype == np.uint8
    assert image[0, 0].tolist() == [round(0.75 * 255), 0, 255]


def test_model_without_encoder_for_pictures_takes_none(sd):
    sessions = DiffusionSessions(sd.sessions.encoders, sd.sessions.unet, sd.sessions.vae_decoder, None)
    runner = DiffusionRunner(sessions, sd.facts)
    with pytest.raises(EngineError, match="has no graph for pictures to begin with"):
        runner.execute(DenoiseBatch(source=source_of(picture_file())))


def test_graph_that_fails_says_which_model(sd):
    picture = sd.picture()
    picture.prompt.encoded = EncodedPrompt(np.zeros((3, WIDTH + 1), np.float32))
    picture.negative = None
    with pytest.raises(EngineError, match="tiny"):
        sd.round(picture)


def test_warm_up_runs_every_layout(model, caplog):
    caplog.set_level("INFO")
    model.runner.warm_up()
    assert "tiny: warmed up" in caplog.text


def test_limits_are_none(sd):
    assert sd.runner.limits.num_slots == 1


def test_closed_runner_has_closed_all_its_sessions(tmp_path):
    model = Model(tmp_path, "sdxl")
    model.runner.close()
    picture = model.picture()
    with pytest.raises(EngineError):
        model.begin(picture)
    for prompt in (picture.prompt, picture.negative):
        prompt.encoded = EncodedPrompt(np.zeros((3, WIDTH + WIDTH_2), np.float32), np.zeros(POOLED_WIDTH, np.float32))
    with pytest.raises(EngineError):
        model.round(picture)
    picture.latents = np.zeros(LATENTS, np.float32)
    with pytest.raises(EngineError):
        model.decode(picture)


@pytest.mark.parametrize(
    ("layout", "fields", "words"),
    [
        ("sd", {"pooled_width": 7}, "is no unet of a diffusion model: see text_embeds, time_ids"),
        ("sd", {"guidance_width": 8}, "is no unet of a diffusion model: see timestep_cond"),
        ("sdxl", {"pooled_width": None}, "is no unet of a diffusion model: see text_embeds, time_ids"),
        ("lcm", {"guidance_width": None}, "is no unet of a diffusion model: see timestep_cond"),
        ("sdxl", {"pooled_width": 9}, "takes text_embeds of size 7, not 9"),
        ("lcm", {"guidance_width": 4}, "takes timestep_cond of size 8, not 4"),
        ("sd", {"latent_channels": 16, "preview": []}, "takes sample of size 4, not 16"),
        ("sd", {"preview": PREVIEW[:4]}, "has 4 rows; 4 channels and a constant are needed"),
        ("sd", {"size_multiple": 6}, "size_multiple: is no multiple of pixels_per_latent, 4"),
        ("sd", {"size": [32, 36]}, "size: is no multiple of size_multiple, 8"),
    ],
)
def test_manifest_that_does_not_fit_the_graphs_is_refused(models, layout, fields, words):
    facts = msgspec.structs.replace(models[layout].facts, **fields)
    with pytest.raises(ConfigError) as caught:
        DiffusionRunner(models[layout].sessions, facts)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("sd", {"max_tokens": 77}, "text_encoder.onnx: takes input_ids of size 24, not 77"),
        ("sd", {"has_pooled": True}, "text_encoder.onnx: is no text_encoder of a diffusion model: see pooled"),
        ("sdxl", {"has_pooled": False}, "diffusion.pooled_width: is there where an encoder has_pooled"),
    ],
)
def test_encoder_that_does_not_fit_the_manifest_is_refused(models, layout, changes, words):
    facts = models[layout].facts
    encoders = [*facts.encoders[:-1], msgspec.structs.replace(facts.encoders[-1], **changes)]
    with pytest.raises(ConfigError) as caught:
        DiffusionRunner(models[layout].sessions, msgspec.structs.replace(facts, encoders=encoders))
    assert words in str(caught.value)


@pytest.mark.parametrize("role", ["unet", "vae_decoder", "vae_encoder", "text_encoder"])
def test_graph_that_is_another_is_refused(tmp_path, role):
    folder = make_diffusion_model(tmp_path)
    other = "unet" if role != "unet" else "vae_decoder"
    onnx.save_model(make_graphs()[other], folder / f"{role}.onnx")
    facts = make_facts()
    with pytest.raises(ConfigError, match=f"{role}.onnx: is no {role} of a diffusion model"):
        DiffusionRunner(open_sessions(folder, facts), facts)


def test_widths_of_encoders_that_do_not_fit_the_unet_are_refused(tmp_path, models):
    folder = make_diffusion_model(tmp_path)
    onnx.save_model(make_graphs("sdxl")["unet"], folder / "unet.onnx")
    facts = msgspec.structs.replace(make_facts(), pooled_width=POOLED_WIDTH)
    with pytest.raises(ConfigError, match=f"encoder_hidden_states of size {WIDTH + WIDTH_2}, not {WIDTH}"):
        DiffusionRunner(open_sessions(folder, facts), facts)
