"""The demo model's scenes, captions, judge and training, the latter with models of a few steps."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of diffusers' own imports
    diffusers = pytest.importorskip("diffusers")

import torch

from demo_diffusion.captions import Asked, AskedThing, caption, words
from demo_diffusion.evaluate import paint, prompts
from demo_diffusion.judge import judge, look
from demo_diffusion.model import make_autoencoder, make_tokenizer, whiten
from demo_diffusion.scenes import SHAPES, Scene, draw, outlines, sample_scene
from demo_diffusion.train import STAGES, Plan, run

_TINY = {
    "num_scenes": 8,
    "autoencoder_batch": 2,
    "text_batch": 4,
    "denoiser_batch": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums over threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _scene(number: int) -> tuple[Scene, np.random.Generator]:
    rng = np.random.default_rng([77, number])
    return sample_scene(rng), rng


def test_judge_sees_in_clean_renders_what_their_captions_ask_for() -> None:
    for number in range(60):
        scene, rng = _scene(number)
        text, asked = caption(scene, rng)
        verdict = judge(asked, look(draw(scene)))
        assert verdict.exact, text
        assert False not in (verdict.sizes, verdict.relation, verdict.background), text


def test_judge_misses_what_is_not_there() -> None:
    scene = next(each for each, _ in map(_scene, range(99)) if len(each.things) == 1)
    thing, seen = scene.things[0], look(draw(scene))
    other_shape = next(shape for shape in SHAPES if shape != thing.shape)
    other_colour = "red" if thing.colour != "red" else "blue"
    right = AskedThing(thing.shape, thing.colour, None)
    assert judge(Asked((right,), None, scene.background), seen).exact
    for wrong in (AskedThing(other_shape, thing.colour, None), AskedThing(thing.shape, other_colour, None)):
        assert not judge(Asked((wrong,), None, None), seen).present
        assert not judge(Asked((right, wrong), "left", None), seen).present
    assert not judge(Asked((right, right), None, None), seen).present


def test_judge_knows_no_shape_in_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert all(thing.shape is None or thing.colour is None for thing in look(noise).things)


def test_scenes_and_captions_are_the_same_for_the_same_seed() -> None:
    (first, first_rng), (again, again_rng) = _scene(5), _scene(5)
    assert first == again
    assert caption(first, first_rng) == caption(again, again_rng)
    assert np.array_equal(draw(first), draw(again))
    assert first != _scene(6)[0]


def test_outlines_fill_the_square_of_their_extent() -> None:
    for shape in SHAPES:
        points = np.concatenate(outlines(shape))
        assert 0.85 <= np.abs(points).max() <= 1.15, shape
    with pytest.raises(ValueError, match="no shape is called 'hexagon'"):
        outlines("hexagon")


def test_every_word_of_captions_is_one_token() -> None:
    tokenizer = make_tokenizer()
    known = [word for word in words() if word not in ("4k", "a", ",")]
    assert len(known) > 60
    assert all(len(tokenizer(word).input_ids) == 3 for word in known)
    assert tokenizer("A Red CIRCLE").input_ids == tokenizer("a red circle").input_ids
    assert len(tokenizer("zyxw").input_ids) > 3
    assert "<|endoftext|>" not in tokenizer.decode(tokenizer("ünïcode ☃").input_ids[1:-1])


def test_prompts_of_the_evaluation_stay_the_same() -> None:
    assert prompts(20, 2) == prompts(20, 2)
    assert {thing.shape for each in prompts(20, 1) for thing in each.asked.things} == set(SHAPES)
    assert all(len(each.asked.things) == 2 for each in prompts(20, 2))


def test_whitening_changes_latents_and_no_picture() -> None:
    torch.manual_seed(0)
    autoencoder = make_autoencoder().eval()
    pictures = torch.rand(4, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = autoencoder.encode(pictures).latent_dist.mean
        decoded = autoencoder.decode(before).sample
        whiten(autoencoder, before.mean(dim=(0, 2, 3)), before.std(dim=(0, 2, 3)))
        after = autoencoder.encode(pictures).latent_dist.mean
        assert after.mean(dim=(0, 2, 3)).numpy() == pytest.approx(np.zeros(4), abs=1e-4)
        assert after.std(dim=(0, 2, 3)).numpy() == pytest.approx(np.ones(4), rel=1e-3)
        assert torch.allclose(autoencoder.decode(after).sample, decoded, atol=1e-4)


def _plan(cache: Path, stop_at: int | None = None) -> Plan:
    """Three steps of every stage."""
    return Plan(cache=cache, autoencoder_steps=3, text_steps=3, denoiser_steps=3, stop_at=stop_at, **_TINY)


def _weights(cache: Path, stage: str) -> list[torch.Tensor]:
    state = torch.load(cache / f"{stage}.pt", weights_only=True)
    return [*state["averages"], *(each for module in state["modules"] for each in module.values())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache after three steps of every stage, with the pipeline's folder."""
    cache = tmp_path_factory.mktemp("trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(_plan(cache), list(STAGES))
    return cache


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["autoencoder", "text", "denoiser"])
def test_stopped_training_goes_on_to_the_same_numbers(trained: Path, tmp_path: Path, stage: str) -> None:
    for name in ("latents.npy", "whiten.pt", *(f"{earlier}.pt" for earlier in STAGES[: STAGES.index(stage)])):
        if (trained / name).exists():
            (tmp_path / name).hardlink_to(trained / name)
    run(_plan(tmp_path, stop_at=1), [stage])
    assert torch.load(tmp_path / f"{stage}.pt", weights_only=True)["step"] == 1
    run(_plan(tmp_path), [stage])
    resumed, straight = (
        torch.cat([each.float().flatten() for each in _weights(at, stage)]) for at in (tmp_path, trained)
    )
    # On average: a lost moment or another batch moves every weight by 1e-5, and rounding just those biases that norms
    # take away again, of whose gradients, zeros but for that, Adam makes whole steps.
    assert float((resumed - straight).abs().mean()) < 4e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_folder_loads_in_diffusers_and_paints(trained: Path) -> None:
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(trained / "pipeline", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    texts = ["a red circle", "two white rings on a black background"]
    pictures = paint(pipeline, texts, steps=2, guidance=3.0)
    assert pictures.shape == (2, 64, 64, 3)
    assert np.array_equal(pictures, paint(pipeline, texts, steps=2, guidance=3.0))
    assert sum(each.numel() for each in pipeline.unet.parameters()) < 8_000_000
