from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.configs import read

from sardonyx.repository.families import Diffusion, Encoder, ImageInput, PromptEncoder
from sardonyx.repository.graph_check import GraphTensor
from sardonyx.repository.tensorrt_bounds import (
    DenoiseSteps,
    EncoderSteps,
    diffusion_bounds,
    encoder_bounds,
    image_bounds,
    tensor_bounds,
)
from sardonyx.repository.tensorrt_shapes import Bounds, derive_profile, fixed, profile_options, read_profile

GOLDEN = msgspec.json.decode((Path(__file__).parent / "shape_profiles.json").read_bytes())

CLIP = PromptEncoder(graph="text_encoder", tokenizer="tokenizer.json", max_tokens=77, pad_token_id=0)
DIFFUSION = Diffusion(encoders=[CLIP], latent_channels=4, pixels_per_latent=8, size=[512, 768])
DENOISE = DenoiseSteps(max_batch_rows=8, max_batch_prompts=8, max_side=1024)
ENCODER = Encoder(layout="padded", output="values", width=384, vocab_size=1000, max_model_len=512)
STEPS = EncoderSteps(max_batch_tokens=4096, max_batch_size=64, max_model_len=512)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_profile_of_a_tensor_model_comes_from_its_config_and_its_graph(case):
    config = read(case["config"], num_gpus=1)
    inputs = [GraphTensor(name, 11, tuple(dims)) for name, dims in case["graph"].items()]
    tensorrt = next(each for each in config.providers if each.name == "tensorrt")
    profile = derive_profile(inputs, tensor_bounds(config), read_profile(tensorrt.options))
    assert profile_options(profile) == case["options"]


def test_padded_encoder_is_bounded_by_rows_and_length():
    rows, length = Bounds(1, 32, 64), Bounds(1, 128, 512)
    bounds = encoder_bounds(ENCODER, STEPS)
    assert bounds["encoder"]["attention_mask"] == (rows, length)
    assert bounds["head"]["token_embeddings"] == (rows, length, None)
    assert bounds["head"]["seqlens"] == (rows,)


def test_packed_encoder_is_bounded_by_tokens_as_well():
    bounds = encoder_bounds(msgspec.structs.replace(ENCODER, layout="packed"), STEPS)["encoder"]
    assert bounds["input_ids"] == (Bounds(1, 4096, 4096),)
    assert bounds["row_gather"] == (Bounds(1, 32, 64), Bounds(1, 128, 512))
    assert bounds["seqlens"] == (Bounds(1, 32, 64),)


def test_a_text_longer_than_a_step_runs_alone_and_is_within_the_profile():
    steps = EncoderSteps(max_batch_tokens=16, max_batch_size=64, max_model_len=512)
    bounds = encoder_bounds(msgspec.structs.replace(ENCODER, layout="packed"), steps)["encoder"]
    assert bounds["input_ids"] == (Bounds(1, 16, 512),)
    assert bounds["seqlens"] == (Bounds(1, 1, 16),)


def test_image_classifier_takes_one_size_in_its_own_layout():
    image = ImageInput(name="x", output="y", layout="NHWC", resize=[256], crop=[224, 192], mean=[0.0] * 3)
    assert image_bounds(image, 8) == {"model": {"x": (Bounds(1, 8, 8), fixed(224), fixed(192), fixed(3))}}
    image = msgspec.structs.replace(image, layout="NCHW")
    assert image_bounds(image, 1) == {"model": {"x": (Bounds(1, 1, 2), fixed(3), fixed(224), fixed(192))}}


def test_diffusion_models_graphs_are_bounded_by_rows_and_sides():
    bounds = diffusion_bounds(DIFFUSION, DENOISE)
    y, x = Bounds(8, 64, 128), Bounds(8, 96, 128)
    rows = Bounds(1, 2, 8)
    assert bounds["unet"]["sample"] == (rows, fixed(4), y, x)
    assert bounds["unet"]["encoder_hidden_states"] == (rows, fixed(77), None)
    assert bounds["text_encoder"] == {"input_ids": (Bounds(1, 2, 8), fixed(77))}
    assert bounds["vae_decoder"] == {"latents": (fixed(1), fixed(4), y, x)}
    assert bounds["vae_encoder"] == {"image": (fixed(1), fixed(3), Bounds(64, 512, 1024), Bounds(64, 768, 1024))}


def test_picture_with_guidance_is_within_the_profile_although_a_call_has_one_row():
    steps = DenoiseSteps(max_batch_rows=1, max_batch_prompts=8, max_side=64)
    assert diffusion_bounds(DIFFUSION, steps)["unet"]["timestep"] == (Bounds(1, 2, 2),)


def test_models_own_size_is_within_the_profile_whatever_the_longest_side():
    steps = DenoiseSteps(max_batch_rows=1, max_batch_prompts=8, max_side=64)
    assert diffusion_bounds(DIFFUSION, steps)["vae_decoder"]["latents"][2:] == (Bounds(8, 64, 96), Bounds(8, 96, 96))


COUNTS = st.integers(1, 1 << 16)


@given(COUNTS, COUNTS, COUNTS, st.sampled_from(["packed", "padded"]))
def test_bounds_of_encoders_ascend_and_hold_what_the_engine_may_make(tokens, rows, length, layout):
    steps = EncoderSteps(max_batch_tokens=tokens, max_batch_size=rows, max_model_len=length)
    for graph in encoder_bounds(msgspec.structs.replace(ENCODER, layout=layout), steps).values():
        for axes in graph.values():
            for bounds in axes:
                assert bounds is None or 1 <= bounds.min <= bounds.opt <= bounds.max
        if "input_ids" in graph and layout == "packed":
            assert graph["input_ids"][0].max >= max(tokens, length)
            assert graph["row_gather"][0].max >= min(rows, tokens)
        elif "input_ids" in graph:
            assert graph["input_ids"][0].max >= min(rows, tokens)
            assert graph["input_ids"][1].max >= length


@given(COUNTS, st.integers(64, 1 << 14))
def test_bounds_of_diffusion_models_ascend_and_hold_every_allowed_size(rows, side):
    steps = DenoiseSteps(max_batch_rows=rows, max_batch_prompts=8, max_side=side)
    bounds = diffusion_bounds(DIFFUSION, steps)
    for graph in bounds.values():
        for axes in graph.values():
            assert all(each is None or 1 <= each.min <= each.opt <= each.max for each in axes)
    largest = side // DIFFUSION.size_multiple * DIFFUSION.size_multiple
    assert bounds["unet"]["sample"][2].max * DIFFUSION.pixels_per_latent >= largest
