"""Tiny pipelines of diffusers through the whole export."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.export.diffusion_pipelines import LATENT_SIZE, PIXELS_PER_LATENT, make_pipeline

from sardonyx.errors import ConfigError
from sardonyx.repository.check import check_repository
from sardonyx.repository.manifest import Manifest
from sardonyx.runtime.session import open_session
from sardonyx_export.errors import ExportError
from sardonyx_export.families.diffusion import DiffusionSpec, read_diffusion_spec
from sardonyx_export.pipeline import run_export
from sardonyx_export.request import ExportRequest, ExportResult, Lora, find_existing
from sardonyx_export.sources.model_folder import ModelFolder
from sardonyx_export.sources.pipeline_folder import read_weights
from sardonyx_export.stages.diffusion_verify import (
    Trial,
    compare_part,
    compare_picture,
    library_picture,
    make_trials,
)
from sardonyx_export.traced_diffusion import Components, load_components, load_tokenizers

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export-torch` is not installed")

PROMPT = "The cat's 2 dogs, naïve"
LATENTS = ["batch", 4, "y", "x"]
SIGNATURES: dict[str, dict[str, list[str | int]]] = {
    "text_encoder": {"input_ids": ["batch", 12], "hidden": ["batch", 12, 16]},
    "unet": {
        "sample": LATENTS,
        "timestep": ["batch"],
        "encoder_hidden_states": ["batch", "tokens", 16],
        "noise_pred": LATENTS,
    },
    "vae_decoder": {"latents": LATENTS, "image": ["batch", 3, "height", "width"]},
    "vae_encoder": {"image": ["batch", 3, "height", "width"], "mean": LATENTS, "std": LATENTS},
}
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def export(source: Path, root: Path, **options: Any) -> ExportResult:
    request = ExportRequest(source=str(source), repository=root, **options)
    return run_export(request, progress=lambda *_: None, announce=lambda _: None)


class Exported:
    """A pipeline and what became of it."""

    def __init__(self, source: Path, root: Path, **options: Any) -> None:
        self.source = source
        self.root = root
        self.result = export(source, root, **options)

    @property
    def manifest(self) -> Manifest:
        return self.result.manifest

    def path(self, role: str) -> Path:
        return self.result.path / self.manifest.graphs[role].model.path

    def load(self) -> tuple[DiffusionSpec, Components]:
        """The pipeline in torch, as what is exported is compared with it."""
        spec = read_diffusion_spec(ModelFolder(self.source))
        assert self.manifest.diffusion is not None
        spec = msgspec.structs.replace(spec, facts=self.manifest.diffusion)
        weights = read_weights(self.source, spec.components)
        return spec, load_components(self.source, spec, weights, load_tokenizers(self.source, spec))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("sd")
    return Exported(make_pipeline(root / "Tiny-SD"), root / "repository")


def signature(graph: Path) -> dict[str, list[str | int]]:
    model = onnx.load(str(graph), load_external_data=False)
    return {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }


def test_a_folder_becomes_a_model_that_the_server_can_check(sd: Exported) -> None:
    manifest = sd.manifest
    assert (sd.result.name, manifest.family, manifest.precision) == ("tiny-sd", "diffusion", "fp32")
    assert manifest.source.architecture == "StableDiffusionPipeline"
    assert manifest.source.weights == "F32 → float32; traced by torch"
    assert "diffusers" in manifest.tools
    assert sorted(manifest.graphs) == sorted(SIGNATURES)
    assert [file.path for file in manifest.files] == ["scheduler_config.json", "tokenizer.json"]
    assert check_repository(sd.root) == []


def test_graphs_have_the_tensors_of_the_contract_and_no_operators_of_one_runtime(sd: Exported) -> None:
    for role, wanted in SIGNATURES.items():
        assert signature(sd.path(role)) == wanted, role
        model = onnx.load(str(sd.path(role)), load_external_data=False)
        onnx.checker.check_model(str(sd.path(role)))
        assert {node.domain for node in model.graph.node} == {""}
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 23)]
        assert len(sd.manifest.graphs[role].data) == 1
        assert b"site-packages" not in sd.path(role).read_bytes()


def test_attention_is_one_operator(sd: Exported) -> None:
    model = onnx.load(str(sd.path("unet")), load_external_data=False)
    names = [node.op_type for node in model.graph.node]
    assert (names.count("Attention"), names.count("Softmax")) == (8, 0)


def test_parity_is_stated_for_every_part_and_for_a_picture(sd: Exported) -> None:
    parts = [each.reference.partition(", ")[2] for each in sd.manifest.parity]
    assert parts == [
        "text_encoder at 3 shapes",
        "unet at 3 shapes",
        "vae_encoder at 3 shapes",
        "vae_decoder at 3 shapes",
        "a picture of 4 steps",
    ]
    assert all(each.reference.startswith("diffusers ") for each in sd.manifest.parity)
    assert all(each.max_abs_error < 1e-4 for each in sd.manifest.parity)
    assert [each.num_positions for each in sd.manifest.parity] == [6, 6, 6, 6, 1]


def test_the_tokenizer_gives_the_ids_of_the_library(sd: Exported) -> None:
    import tokenizers

    (expected,) = load_tokenizers(sd.source, read_diffusion_spec(ModelFolder(sd.source))).values()
    written = tokenizers.Tokenizer.from_file(str(sd.result.path / "tokenizer.json"))
    assert written.encode(PROMPT).ids == expected(PROMPT).input_ids
    assert sd.manifest.diffusion is not None
    assert sd.manifest.diffusion.encoders[0].pad_token_id == expected.pad_token_id


def test_latents_of_a_picture_are_on_the_scale_of_the_unet(sd: Exported) -> None:
    _, components = sd.load()
    edge = LATENT_SIZE * PIXELS_PER_LATENT
    image = np.random.default_rng(0).uniform(-1, 1, (2, 3, edge, edge)).astype(np.float32)
    found = open_session(sd.path("vae_encoder"), model_name="m").run({"image": image})
    with torch.no_grad():
        wanted = components.vae.encode(torch.from_numpy(image)).latent_dist
    scale = components.vae.config.scaling_factor
    np.testing.assert_allclose(found["mean"], wanted.mean.numpy() * scale, atol=1e-5)
    np.testing.assert_allclose(found["std"], wanted.std.numpy() * scale, atol=1e-5)


def test_the_preview_is_nearer_to_a_picture_than_its_mean_is(sd: Exported) -> None:
    assert sd.manifest.diffusion is not None
    rows = np.array(sd.manifest.diffusion.preview)
    assert rows.shape == (5, 3)
    edge = LATENT_SIZE * PIXELS_PER_LATENT
    ramp = np.linspace(-1, 1, edge, dtype=np.float32)
    image = np.stack([np.tile(ramp, (edge, 1)), np.tile(ramp[:, None], (1, edge)), np.tile(-ramp, (edge, 1))])[None]
    latents = open_session(sd.path("vae_encoder"), model_name="m").run({"image": image})["mean"]
    drawn = open_session(sd.path("vae_decoder"), model_name="m").run({"latents": latents})["image"][0]
    small = drawn.reshape(3, LATENT_SIZE, PIXELS_PER_LATENT, LATENT_SIZE, PIXELS_PER_LATENT).mean(axis=(2, 4))
    rough = np.einsum("cyx,cr->ryx", latents[0], rows[:4]) + rows[4][:, None, None]
    error, spread = np.square(rough - small).mean(), small.var(axis=(1, 2)).mean()
    assert error < spread


def test_an_export_that_is_there_is_found_by_its_precision_and_styles(sd: Exported) -> None:
    request = ExportRequest(source=str(sd.source), repository=sd.root, task="text-to-image")
    found = find_existing(request)
    assert found is not None
    assert found.version == 1
    changed = [{"precision": "fp16"}, {"task": "embeddings"}, {"loras": (Lora(path=Path("a.safetensors")),)}]
    assert all(find_existing(msgspec.structs.replace(request, **fields)) is None for fields in changed)


def test_a_part_that_gives_other_numbers_is_not_published(sd: Exported) -> None:
    spec, components = sd.load()
    trials = make_trials("text_encoder", components, spec)
    compare_part("text_encoder", sd.path("text_encoder"), trials, "fp32", "r")
    off = [Trial(each.inputs, [each.expected[0] * 1.001]) for each in trials]
    with pytest.raises(ExportError, match=r"the text_encoder is not what its source says: off by 0\.000999"):
        compare_part("text_encoder", sd.path("text_encoder"), off, "fp32", "r")
    nothing = [Trial(each.inputs, [np.full_like(each.expected[0], np.nan)]) for each in trials]
    with pytest.raises(ExportError, match="off by nan"):
        compare_part("text_encoder", sd.path("text_encoder"), nothing, "fp16", "r")


def test_another_picture_is_not_published(sd: Exported) -> None:
    spec, components = sd.load()
    picture = library_picture(components, spec)
    paths = {role: sd.path(role) for role in sd.manifest.graphs}
    texts = {"tokenizer.json": (sd.result.path / "tokenizer.json").read_bytes()}
    compare_picture(picture, paths, texts, spec, "fp32", "r")
    with pytest.raises(ExportError, match="draw another picture than r"):
        compare_picture(picture[:, ::-1], paths, texts, spec, "fp16", "r")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "int8 is not for diffusion models; fp32 and fp16 are"),
        ({"activations": "fp32"}, "--activations: follow from the precision"),
        ({"max_model_len": 5}, "--max-model-len: follows from the text encoders"),
        ({"pooling": "mean"}, "--pooling: is for embeddings; this is exported as text-to-image"),
        ({"task": "embeddings"}, "--task: is embeddings; the source is of the task text-to-image"),
    ],
)
def test_options_of_other_models_are_refused(
    sd: Exported, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(sd.source, tmp_path, **options)


def test_a_tokenizer_without_files_is_named(sd: Exported, tmp_path: Path) -> None:
    spec = read_diffusion_spec(ModelFolder(sd.source))
    with pytest.raises(ExportError, match=r"tokenizer/vocab\.json: is missing"):
        load_tokenizers(tmp_path, spec)


def test_a_part_without_all_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    source = make_pipeline(tmp_path / "m")
    path = source / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"lacks weights of UNet2DConditionModel: conv_in\.bias"):
        export(source, tmp_path / "repository")


@pytest.mark.slow
def test_sdxl_has_two_encoders_a_summary_and_sizes(tmp_path: Path) -> None:
    made = Exported(make_pipeline(tmp_path / "xl", "sdxl"), tmp_path / "r")
    assert signature(made.path("text_encoder_2")) == {
        "input_ids": ["batch", 12],
        "hidden": ["batch", 12, 24],
        "pooled": ["batch", 12],
    }
    unet = signature(made.path("unet"))
    assert (unet["text_embeds"], unet["time_ids"]) == (["batch", 12], ["batch", 6])
    assert made.manifest.diffusion is not None
    first, second = made.manifest.diffusion.encoders
    assert first.pad_token_id != second.pad_token_id == 0
    assert len(made.manifest.parity) == 6
    assert check_repository(made.root) == []


@pytest.mark.slow
def test_a_latent_consistency_model_draws_the_picture_of_the_library(tmp_path: Path) -> None:
    made = Exported(make_pipeline(tmp_path / "lcm", "lcm"), tmp_path / "r")
    assert signature(made.path("unet"))["timestep_cond"] == ["batch", 6]
    assert made.manifest.parity[-1].max_abs_error < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd", "sdxl"])
def test_half_precision_keeps_float32_outside_and_sdxl_its_vae(tmp_path: Path, layout: Any) -> None:
    made = Exported(make_pipeline(tmp_path / "m", layout), tmp_path / "r", precision="fp16")
    assert made.manifest.precision == "fp16"
    halves = {}
    for role in made.manifest.graphs:
        model = onnx.load(str(made.path(role)))
        values = (*model.graph.input, *model.graph.output)
        plain = {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
        assert {value.type.tensor_type.elem_type for value in values} <= plain
        stored = [each.data_type for each in model.graph.initializer if len(each.dims) > 1]
        halves[role] = stored.count(onnx.TensorProto.FLOAT16) / len(stored)
    assert all(share > 0.9 for role, share in halves.items() if not role.startswith("vae"))
    assert {share for role, share in halves.items() if role.startswith("vae")} == {0.0 if layout == "sdxl" else 1.0}
    tolerances = {each.reference.split()[2]: each.tolerance for each in made.manifest.parity}
    assert all("0.02" in tolerances[name] for name in ("text_encoder", "unet", "a"))
    assert ("0.0001" if layout == "sdxl" else "0.02") in tolerances["vae_decoder"]
    assert made.manifest.source.weights.endswith("VAE float32; traced by torch") is (layout == "sdxl")


@pytest.mark.slow
def test_a_model_of_velocities_and_of_few_steps_draws_the_picture_of_the_library(tmp_path: Path) -> None:
    velocity = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    source = make_pipeline(tmp_path / "v", scheduler=("DDIMScheduler", {**velocity, "clip_sample": False}))
    assert export(source, tmp_path / "r").manifest.parity[-1].max_abs_error < 1e-3
    turbo = ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"})
    source = make_pipeline(
        tmp_path / "turbo", "sdxl", scheduler=turbo, vae={"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    )
    manifest = export(source, tmp_path / "r").manifest
    assert manifest.diffusion is not None
    assert manifest.diffusion.default_guidance == 1.0


@pytest.mark.slow
def test_a_style_is_merged_and_named(tmp_path: Path) -> None:
    source = make_pipeline(tmp_path / "m")
    source.joinpath("model_index.json").write_text(
        json.dumps(
            json.loads(source.joinpath("model_index.json").read_text())
            | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        )
    )
    generator = np.random.default_rng(0)
    down, up = (generator.standard_normal(shape).astype(np.float32) for shape in ((2, 8), (8, 2)))
    save_file({f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}, tmp_path / "s.safetensors")
    plain = Exported(source, tmp_path / "r")
    request = {"loras": (Lora(path=tmp_path / "s.safetensors", scale=0.5),), "adds_version": True}
    styled = Exported(source, tmp_path / "r", **request)
    assert styled.manifest.source.weights == (
        "F32 → float32; traced by torch; the source's safety checker is not part of it; "
        "LoRA merged: s.safetensors by 0.5"
    )
    inputs = {
        "sample": generator.standard_normal((1, 4, 6, 6)).astype(np.float32),
        "timestep": np.float32([500]),
        "encoder_hidden_states": generator.standard_normal((1, 12, 16)).astype(np.float32),
    }
    first, second = (open_session(each.path("unet"), model_name="m").run(inputs) for each in (plain, styled))
    assert np.abs(first["noise_pred"] - second["noise_pred"]).max() > 1e-3
    found = find_existing(ExportRequest(source=str(source), repository=tmp_path / "r", loras=request["loras"]))
    assert found is not None
    assert found.version == 2
