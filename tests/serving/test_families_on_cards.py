"""Models with a manifest where their config asks for a card, with ONNX Runtime's answers as recorded."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.runtime.ort_answers import CPU, CUDA, TENSORRT, FakeRuntime
from tests.tiny_diffusion import make_diffusion_model
from tests.tiny_encoders import make_encoder_model

from sardonyx.errors import ConfigError, InvalidRequest
from sardonyx.metrics import Metrics
from sardonyx.repository import manifest
from sardonyx.repository.layout import Repository, read_manifest
from sardonyx.serving import diffusion_loader, encoder_loader, image_loader
from sardonyx.serving import engines as engines_module
from sardonyx.serving.diffusion_loader import DiffusionLoader
from sardonyx.serving.encoder_loader import EncoderLoader
from sardonyx.serving.engines import EngineFacts
from sardonyx.serving.image_loader import ImageClassifierLoader
from sardonyx.serving.images import ImageLimits, ImageModel
from sardonyx.serving.tasks import ImageOptions
from sardonyx.settings import Settings

FACTS = EngineFacts(tensorrt=(10, 13, 2), compute_capability=90, onnx_runtime="1.31.1")
ON_GPU = "instance_group [ { kind: KIND_GPU } ]\n"
TENSORRT_CONFIG = (
    ON_GPU + 'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" PARAMETERS } } }\n'
)


def tensorrt(**parameters: str) -> str:
    pairs = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
    return TENSORRT_CONFIG.replace("PARAMETERS", pairs)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    for module in (diffusion_loader, encoder_loader, image_loader):
        monkeypatch.setattr(module, "num_gpus", lambda: 1)
    monkeypatch.setattr(engines_module, "read_facts", lambda _: FACTS)
    return FakeRuntime().install(monkeypatch)


def load(loader: Any, root: Path) -> Any:
    try:
        return loader.load(Repository(root).entry("tiny"), 1)
    finally:
        loader.close()


def settings(root: Path) -> Settings:
    return Settings(repository=root, num_threads=2, engine_cache=root.parent / "engines")


def load_diffusion(root: Path) -> Any:
    def no_judge(name: str) -> Any:
        raise AssertionError(name)

    return load(DiffusionLoader(settings(root), Metrics("test"), no_judge), root)


def profiles(runtime: FakeRuntime) -> dict[str, tuple[str, str]]:
    """Smallest and largest shapes of each session on TensorRT, by file."""
    found = {}
    for each in runtime.opened:
        options = dict(each["providers"]).get(TENSORRT, {})
        found[Path(each["path"]).stem] = (options["trt_profile_min_shapes"], options["trt_profile_max_shapes"])
    return found


def test_every_graph_of_a_diffusion_model_has_its_profile(tmp_path: Path, runtime: FakeRuntime) -> None:
    config = tensorrt() + 'parameters { key: "max_batch_rows" value { string_value: "4" } }'
    make_diffusion_model(tmp_path / "models", layout="sdxl", config=config)
    model = load_diffusion(tmp_path / "models")
    # Of twice the side of the pictures that it was trained for: four times as many pixels.
    assert profiles(runtime) == {
        "text_encoder": ("input_ids:1x24", "input_ids:8x24"),
        "text_encoder_2": ("input_ids:1x24", "input_ids:8x24"),
        "unet": (
            "sample:1x4x2x2,timestep:1,encoder_hidden_states:1x24x11,text_embeds:1x7,time_ids:1x6",
            "sample:4x4x16x16,timestep:4,encoder_hidden_states:4x24x11,text_embeds:4x7,time_ids:4x6",
        ),
        "vae_decoder": ("latents:1x4x2x2", "latents:1x4x16x16"),
        "vae_encoder": ("image:1x3x8x8", "image:1x3x64x64"),
    }
    asyncio.run(close(model))


def test_picture_that_no_engine_was_built_for_is_refused(tmp_path: Path, runtime: FakeRuntime) -> None:
    make_diffusion_model(tmp_path / "models", config=tensorrt())

    async def main() -> None:
        model = load_diffusion(tmp_path / "models")
        task = model.task
        assert isinstance(task, ImageModel)
        with pytest.raises(InvalidRequest, match="size: is 72x8; tiny makes sides of at most 64"):
            await task.start(ImageOptions(prompt="a", size=(8, 72)), request_id="call")
        await model.close()

    asyncio.run(main())


def test_operators_own_side_bounds_engines_and_pictures(tmp_path: Path, runtime: FakeRuntime) -> None:
    config = tensorrt() + 'parameters { key: "max_side" value { string_value: "100" } }'
    make_diffusion_model(tmp_path / "models", config=config)
    asyncio.run(close(load_diffusion(tmp_path / "models")))
    assert profiles(runtime)["vae_encoder"] == ("image:1x3x8x8", "image:1x3x96x96")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("padded", "input_ids:64x64"),
        ("packed", "input_ids:256"),
    ],
)
def test_encoder_is_built_for_what_a_step_may_hold(
    tmp_path: Path, runtime: FakeRuntime, layout: Any, expected: str
) -> None:
    parameters = {"max_batch_tokens": "256", "max_batch_size": "64"}
    make_encoder_model(tmp_path / "models", layout=layout, parameters=parameters, config=tensorrt())
    model = load(EncoderLoader(settings(tmp_path / "models"), Metrics("test")), tmp_path / "models")
    assert expected in profiles(runtime)["model"][1].split(",")
    assert len(runtime.opened) == 1  # no second session with all threads
    asyncio.run(close(model))


def test_image_classifier_is_built_for_its_batches(tmp_path: Path, runtime: FakeRuntime) -> None:
    make_encoder_model(
        tmp_path / "models", family="image_classifier", parameters={"max_batch_size": "4"}, config=tensorrt()
    )
    model = load(ImageClassifierLoader(settings(tmp_path / "models"), Metrics("test")), tmp_path / "models")
    [(least, most)] = profiles(runtime).values()
    size = most.split("x")[1]
    assert (least, most) == (f"image:1x{size}x{size}x3", f"image:4x{size}x{size}x3")
    asyncio.run(close(model))


def test_model_on_cuda_gets_no_profiles_and_the_operators_options(tmp_path: Path, runtime: FakeRuntime) -> None:
    options = 'name: "cuda" parameters { key: "prefer_nhwc" value: "1" } parameters { key: "use_tf32" value: "0" }'
    config = f"{ON_GPU} optimization {{ execution_accelerators {{ gpu_execution_accelerator {{ {options} }} }} }}"
    make_diffusion_model(tmp_path / "models", config=config)
    asyncio.run(close(load_diffusion(tmp_path / "models")))
    for each in runtime.opened:
        (cuda, given), (cpu, _) = each["providers"]
        assert (cuda, cpu) == (CUDA, CPU)
        assert given == {
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "device_id": "0",
            "prefer_nhwc": "1",
            "use_tf32": "0",
        }


def test_model_that_asks_for_a_card_is_refused_where_there_is_none(tmp_path: Path) -> None:
    make_diffusion_model(tmp_path / "models", config=ON_GPU)
    with pytest.raises(ConfigError, match="the model asks for a card, and cuda:0 is not there"):
        load_diffusion(tmp_path / "models")


def test_sides_of_pictures_are_free_where_no_engine_is_built_for_them() -> None:
    limits = ImageLimits(max_pixels=4096, max_steps=50, timeout_s=60, queue_timeout_s=60)
    assert limits.allow(8, 512)
    assert not limits.allow(8, 520)
    assert not replace(limits, max_side=64).allow(8, 72)


async def close(model: Any) -> None:
    await model.close()


@pytest.mark.parametrize(("options", "expected"), [("", "1"), ('parameters { key: "prefer_nhwc" value: "0" }', "0")])
def test_pictures_graphs_for_cuda_have_channels_last_unless_told_otherwise(
    tmp_path: Path, runtime: FakeRuntime, options: str, expected: str
) -> None:
    config = f'optimization {{ execution_accelerators {{ gpu_execution_accelerator {{ name: "cuda" {options} }} }} }}'
    folder = make_diffusion_model(tmp_path / "models", config=config)
    described = read_manifest(folder)
    assert described is not None
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(msgspec.structs.replace(described, target="cuda")))
    asyncio.run(close(load_diffusion(tmp_path / "models")))
    given = {Path(each["path"]).stem: dict(each["providers"])[CUDA].get("prefer_nhwc") for each in runtime.opened}
    encoder = expected if options else None
    assert given == {"text_encoder": encoder, "unet": expected, "vae_decoder": expected, "vae_encoder": expected}
