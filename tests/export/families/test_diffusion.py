"""What a pipeline's configurations say, and what is refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.export.diffusion_pipelines import (
    GUIDANCE_WIDTH,
    LATENT_SIZE,
    MAX_TOKENS,
    PIXELS_PER_LATENT,
    POOLED_WIDTH,
    make_pipeline,
)

from sardonyx.errors import ConfigError
from sardonyx_export.families.diffusion import DiffusionSpec, read_diffusion_spec
from sardonyx_export.sources.model_folder import ModelFolder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    make_pipeline(root / "sd")
    make_pipeline(root / "sdxl", "sdxl")
    make_pipeline(root / "lcm", "lcm")
    return root


def change(folder: Path, copy: Path, file: str, **fields: Any) -> Path:
    """A copy with other fields in one of its JSON files."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return copy


def read(folder: Path) -> DiffusionSpec:
    return read_diffusion_spec(ModelFolder(folder))


def test_stable_diffusion_has_one_encoder_and_its_usual_guidance(pipelines: Path) -> None:
    spec = read(pipelines / "sd")
    facts = spec.facts
    assert [(each.graph, each.tokenizer, each.max_tokens, each.has_pooled) for each in facts.encoders] == [
        ("text_encoder", "tokenizer.json", MAX_TOKENS, False)
    ]
    edge = LATENT_SIZE * PIXELS_PER_LATENT
    assert (facts.size, facts.size_multiple, facts.pixels_per_latent) == ([edge, edge], 4, 4)
    assert (facts.pooled_width, facts.guidance_width, facts.zeroes_empty_prompt) == (None, None, False)
    assert (facts.default_steps, facts.default_guidance) == (30, 7.5)
    assert (spec.keeps_vae_in_float32, spec.has_safety_checker) == (False, False)


def test_sdxl_has_two_encoders_of_which_the_second_gives_a_summary(pipelines: Path) -> None:
    spec = read(pipelines / "sdxl")
    facts = spec.facts
    assert [(each.graph, each.tokenizer, each.has_pooled) for each in facts.encoders] == [
        ("text_encoder", "tokenizer.json", False),
        ("text_encoder_2", "tokenizer_2.json", True),
    ]
    assert spec.tokenizers == {"tokenizer.json": "tokenizer", "tokenizer_2.json": "tokenizer_2"}
    assert (facts.pooled_width, facts.zeroes_empty_prompt, facts.default_guidance) == (POOLED_WIDTH, True, 5.0)
    assert spec.keeps_vae_in_float32


def test_a_latent_consistency_model_takes_guidance_as_a_number(pipelines: Path) -> None:
    facts = read(pipelines / "lcm").facts
    assert (facts.guidance_width, facts.default_steps, facts.default_guidance) == (GUIDANCE_WIDTH, 4, 8.5)


def test_a_vae_that_says_so_may_be_halved_in_sdxl_too(pipelines: Path, tmp_path: Path) -> None:
    changed = change(pipelines / "sdxl", tmp_path / "m", "vae/config.json", force_upcast=False)
    assert not read(changed).keeps_vae_in_float32


def test_zeros_for_an_empty_prompt_can_be_switched_off(pipelines: Path, tmp_path: Path) -> None:
    changed = change(pipelines / "sdxl", tmp_path / "m", "model_index.json", force_zeros_for_empty_prompt=False)
    assert not read(changed).facts.zeroes_empty_prompt


def test_a_safety_checker_is_noted(pipelines: Path, tmp_path: Path) -> None:
    named = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert read(change(pipelines / "sd", tmp_path / "m", "model_index.json", safety_checker=named)).has_safety_checker


def test_sizes_that_differ_are_height_and_width(pipelines: Path, tmp_path: Path) -> None:
    changed = change(pipelines / "sd", tmp_path / "m", "unet/config.json", sample_size=[12, 8])
    assert read(changed).facts.size == [48, 32]


@pytest.mark.parametrize(
    ("fields", "steps", "guidance"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, 4, 1.0),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, 4, 1.0),
        ({"_class_name": "LCMScheduler"}, 4, 1.0),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, 30, 7.5),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 30, 7.5),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
            30,
            7.5,
        ),
    ],
)
def test_the_scheduler_tells_models_of_few_steps(
    pipelines: Path, tmp_path: Path, fields: dict[str, Any], steps: int, guidance: float
) -> None:
    folder = change(pipelines / "sd", tmp_path / "m", "scheduler/scheduler_config.json", skip_prk_steps=None, **fields)
    facts = read(folder).facts
    assert (facts.default_steps, facts.default_guidance) == (steps, guidance)


def test_a_scheduler_with_an_infinite_number_is_kept_as_it_is(pipelines: Path, tmp_path: Path) -> None:
    shutil.copytree(pipelines / "sd", tmp_path / "m")
    text = '{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}'
    (tmp_path / "m" / "scheduler" / "scheduler_config.json").write_text(text)
    assert read(tmp_path / "m").scheduler == text.encode()


@pytest.mark.parametrize(
    ("layout", "file", "fields", "message"),
    [
        ("sd", "unet/config.json", {"in_channels": 9}, "in_channels: is 9: an inpainting UNet is not built"),
        ("sd", "unet/config.json", {"in_channels": 8}, "InstructPix2Pix"),
        ("sd", "unet/config.json", {"out_channels": 8}, "out_channels: is 8; 4 are built"),
        ("sd", "unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type: is 'timestep'"),
        ("sd", "unet/config.json", {"addition_embed_type": "text"}, "addition_embed_type: is 'text'; None is built"),
        ("sd", "unet/config.json", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
        ("sd", "unet/config.json", {"cross_attention_dim": 24}, "is 24; the text encoders give 16"),
        ("sd", "unet/config.json", {"time_cond_proj_dim": "x"}, "time_cond_proj_dim: is no positive number"),
        ("sd", "unet/config.json", {"sample_size": [1, 2, 3]}, "sample_size"),
        ("sd", "vae/config.json", {"latent_channels": 0}, "latent_channels: is 0, no positive number"),
        (
            "sd",
            "vae/config.json",
            {"latents_mean": [0.0] * 4},
            "latents_mean: is set, which no pipeline of this layout",
        ),
        ("sdxl", "vae/config.json", {"shift_factor": 0.1}, "shift_factor: is set"),
        ("sd", "vae/config.json", {"block_out_channels": []}, "block_out_channels"),
        ("sd", "text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask: is set"),
        ("sd", "scheduler/scheduler_config.json", {"_class_name": "HeunDiscreteScheduler"}, "HeunDiscreteScheduler"),
        ("sd", "model_index.json", {"_class_name": "StableDiffusionControlNetPipeline"}, "ControlNet is not built"),
        ("sd", "model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "ControlNet is not built"),
        ("sd", "model_index.json", {"_class_name": "StableDiffusion3Pipeline"}, "StableDiffusion3Pipeline"),
        ("sd", "model_index.json", {"_class_name": "FluxPipeline"}, "is FluxPipeline, which is not built"),
        ("sd", "model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "is AutoencoderTiny; AutoencoderKL"),
        ("sd", "model_index.json", {"text_encoder": ["transformers", "RobertaModel"]}, "is RobertaModel"),
        ("sd", "model_index.json", {"image_encoder": ["transformers", "CLIPVisionModel"]}, "image_encoder: is not"),
        ("sdxl", "model_index.json", {"text_encoder": [None, None]}, "refiner is not built"),
        ("sdxl", "model_index.json", {"requires_aesthetics_score": True}, "refiner is not built"),
        ("sdxl", "unet/config.json", {"projection_class_embeddings_input_dim": 52}, "six sizes make 60"),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    pipelines: Path, tmp_path: Path, layout: str, file: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(change(pipelines / layout, tmp_path / "m", file, **fields))


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_file_is_named(pipelines: Path, tmp_path: Path, file: str) -> None:
    folder = change(pipelines / "sd", tmp_path / "m", "model_index.json")
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=f"{file}: is missing"):
        read(folder)
