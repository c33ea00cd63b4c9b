"""LoRA files of every naming that is read, merged into a pipeline's weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.export.diffusion_pipelines import make_pipeline

from sardonyx_export.errors import ExportError
from sardonyx_export.families.diffusion import read_diffusion_spec
from sardonyx_export.lora import merge_lora
from sardonyx_export.request import Lora
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.pipeline_folder import read_weights
from sardonyx_export.traced_diffusion import Components, load_components, load_tokenizers

QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
CONVOLUTION = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "sdxl", "sdxl")


@pytest.fixture
def components(source: Path) -> Components:
    spec = read_diffusion_spec(ModelFolder(source))
    return load_components(source, spec, read_weights(source, spec.components), load_tokenizers(source, spec))


def weight(model: Any, name: str) -> Any:
    return model.get_submodule(name).weight.detach().numpy().copy()


def pair(model: Any, name: str) -> tuple[Any, Any, Any]:
    """Down, up and their product for a module."""
    shape = tuple(model.get_submodule(name).weight.shape)
    source = np.random.default_rng(len(name))
    down = source.standard_normal((RANK, *shape[1:])).astype(np.float32)
    up = source.standard_normal((shape[0], RANK, *[1] * (len(shape) - 2))).astype(np.float32)
    return down, up, (up.reshape(shape[0], RANK) @ down.reshape(RANK, -1)).reshape(shape)


@pytest.mark.parametrize(
    ("part", "module", "down", "up"),
    [
        ("unet", QUERY, f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"),
        ("unet", QUERY, f"unet.{QUERY}.lora_A.default.weight", f"unet.{QUERY}.lora_B.default.weight"),
        ("unet", QUERY, f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight"),
        (
            "unet",
            OUT,
            f"unet.{OUT.removesuffix('.to_out.0')}.processor.to_out_lora.down.weight",
            f"unet.{OUT.removesuffix('.to_out.0')}.processor.to_out_lora.up.weight",
        ),
        (
            "unet",
            CONVOLUTION,
            f"lora_unet_{CONVOLUTION.replace('.', '_')}.lora_down.weight",
            f"lora_unet_{CONVOLUTION.replace('.', '_')}.lora_up.weight",
        ),
        (
            "text_encoder",
            TEXT,
            f"text_encoder.text_model.{TEXT}.lora_linear_layer.down.weight",
            f"text_encoder.text_model.{TEXT}.lora_linear_layer.up.weight",
        ),
        (
            "text_encoder",
            TEXT,
            f"lora_te_text_model_{TEXT.replace('.', '_')}.lora_down.weight",
            f"lora_te_text_model_{TEXT.replace('.', '_')}.lora_up.weight",
        ),
        (
            "text_encoder_2",
            f"text_model.{TEXT}",
            f"lora_te2_text_model_{TEXT.replace('.', '_')}.lora_down.weight",
            f"lora_te2_text_model_{TEXT.replace('.', '_')}.lora_up.weight",
        ),
    ],
)
def test_a_pair_is_added_to_its_weight(
    components: Components, tmp_path: Path, part: str, module: str, down: str, up: str
) -> None:
    model = components.of(part)
    before = weight(model, module)
    first, second, product = pair(model, module)
    save_file({down: first, up: second}, tmp_path / "style.safetensors")
    assert merge_lora(components, Lora(path=tmp_path / "style.safetensors", scale=0.5)) == 1
    np.testing.assert_allclose(weight(model, module), before + 0.5 * product, atol=1e-5)


def test_alpha_is_by_rank(components: Components, tmp_path: Path) -> None:
    down, up, product = pair(components.unet, QUERY)
    name = f"lora_unet_{QUERY.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.float32([1.0])}
    save_file(tensors, tmp_path / "style.safetensors")
    before = weight(components.unet, QUERY)
    merge_lora(components, Lora(path=tmp_path / "style.safetensors"))
    np.testing.assert_allclose(weight(components.unet, QUERY), before + product / RANK, atol=1e-5)


def matrix(*shape: int) -> Any:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"unet.{QUERY}.dora_scale": matrix(8)}, "no part of a plain LoRA"),
        ({f"lora_unet_{QUERY.replace('.', '_')}.hada_w1_a": matrix(8, 2)}, "no part of a plain LoRA"),
        ({"transformer.x.lora_A.weight": matrix(2, 16)}, "belongs to no part"),
        ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": matrix(2, 16)}, "which this pipeline has not"),
        ({f"unet.{QUERY}.lora_A.weight": matrix(2, 16)}, "has no up matrix"),
        ({f"unet.{QUERY}.lora_B.weight": matrix(16, 2)}, "has no down matrix"),
        ({f"unet.{QUERY}.alpha": matrix(1)}, "holds no pairs"),
        ({f"unet.{QUERY}.lora_A.weight": matrix(2, 16), f"unet.{QUERY}.lora_B.weight": matrix(16, 3)}, "beside one of"),
        ({f"unet.{QUERY}.lora_A.weight": matrix(2, 9), f"unet.{QUERY}.lora_B.weight": matrix(16, 2)}, "the model has"),
    ],
)
def test_what_cannot_be_merged_whole_is_refused(
    components: Components, tmp_path: Path, tensors: dict[str, Any], message: str
) -> None:
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(ExportError, match=message):
        merge_lora(components, Lora(path=tmp_path / "style.safetensors"))


@pytest.mark.parametrize("name", ["style.pt", "none.safetensors"])
def test_only_safetensors_are_opened(components: Components, tmp_path: Path, name: str) -> None:
    (tmp_path / "style.pt").write_bytes(b"\x80\x04")
    with pytest.raises(ExportError, match=r"is no \.safetensors file"):
        merge_lora(components, Lora(path=tmp_path / name))
