"""Train the demo model from nothing: autoencoder, latents, text encoder, UNet.

    nice -n 19 python export/demo_diffusion/train.py .cache/demo-diffusion
    nice -n 19 python export/demo_diffusion/train.py .cache/demo-diffusion --only pipeline

Stopped at any time, the same command goes on where the last checkpoint was. `--only pipeline` writes the folder from
what there is, also while another process trains.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from demo_diffusion.captions import Asked, caption
from demo_diffusion.checkpoint import Trainee
from demo_diffusion.model import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    make_autoencoder,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    save_pipeline,
    whiten,
)
from demo_diffusion.scenes import SIDE, Scene, draw, sample_scene
from demo_diffusion.text_stage import Questions, answers, text_loss, tokenise

STAGES = ("autoencoder", "latents", "text", "denoiser", "pipeline")
_SEEDS = {"scenes": 1, "autoencoder": 2, "text": 3, "denoiser": 4, "whiten": 5}
_KL_WEIGHT = 2e-3
"""Keeps the latents' noise near a twentieth of their spread, so that the decoder forgives small errors."""
_DROPPED = 0.1
_DETAIL_GAIN = 4.0
_MAX_GAIN = 5.0
"""An error of v counts 1 + SNR times that of the picture; beyond this the timestep is drawn that much less often, so no
picture of a batch is spent on noise that hardly shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run does; the defaults are the published model's."""

    cache: Path
    seed: int = 0
    num_scenes: int = 20_000
    autoencoder_steps: int = 9_200
    autoencoder_batch: int = 8
    text_steps: int = 700
    text_batch: int = 128
    denoiser_steps: int = 26_000
    denoiser_batch: int = 32
    denoiser_rate: float = 1e-3
    save_every_s: float = 180.0
    stop_at: int | None = None
    """A step to stop every stage at, with a checkpoint, before its learning rate has come down."""

    def checkpoint(self, stage: str) -> Path:
        return self.cache / f"{stage}.pt"

    def rng(self, purpose: str, number: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _SEEDS[purpose], number])


def scene(plan: Plan, number: int) -> Scene:
    """The training's scene of a number; the same in every stage."""
    return sample_scene(plan.rng("scenes", number))


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """(n, 3, 64, 64) float32 from -1 to 1."""
    drawn = np.stack([draw(each) for each in scenes])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def run_stage(plan: Plan, trainee: Trainee, loss_of_step: Callable[[int], tuple[torch.Tensor, str]]) -> None:
    """Train until the plan's last step, with a checkpoint every few minutes and a line of progress every 100 steps."""
    saved_s = started_s = time.monotonic()
    first = trainee.step
    total = 0.0
    while not (trainee.is_done or trainee.step == plan.stop_at):
        loss, remark = loss_of_step(trainee.step)
        trainee.learn(loss)
        total += float(loss.detach())
        if trainee.step % 100 == 0:
            pace_s = (time.monotonic() - started_s) / (trainee.step - first)
            mean = total / min(100, trainee.step - first)
            say(f"step {trainee.step}: loss {mean:.5f} {remark} ({pace_s:.3f} s a step)")
            total = 0.0
        if time.monotonic() - saved_s >= plan.save_every_s or trainee.is_done or trainee.step == plan.stop_at:
            trainee.save()
            saved_s = time.monotonic()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def autoencoder_of(plan: Plan) -> AutoencoderKL:
    """The trained autoencoder with whitened latents, from the checkpoints of the first two stages."""
    autoencoder = make_autoencoder()
    autoencoder_trainee(plan, autoencoder).use_average()
    measured = torch.load(plan.cache / "whiten.pt", weights_only=True)
    whiten(autoencoder, measured["mean"], measured["deviation"])
    return autoencoder.eval().requires_grad_(False)


def autoencoder_trainee(plan: Plan, autoencoder: AutoencoderKL) -> Trainee:
    path = plan.checkpoint("autoencoder")
    return Trainee(path, [autoencoder], rate=2e-3, num_steps=plan.autoencoder_steps, average=0.995)


def train_autoencoder(plan: Plan) -> None:
    torch.manual_seed(plan.seed)
    autoencoder = make_autoencoder()
    # Latents begin with little noise: at deviation 1 it drowns what a new encoder says, for hundreds of steps.
    torch.nn.init.constant_(autoencoder.quant_conv.bias[LATENT_CHANNELS:], -5.0)
    trainee = autoencoder_trainee(plan, autoencoder)

    def loss_of_step(step: int) -> tuple[torch.Tensor, str]:
        numbers = plan.rng("autoencoder", step).integers(plan.num_scenes, size=plan.autoencoder_batch)
        wanted = pictures([scene(plan, int(number)) for number in numbers])
        generator = torch.Generator().manual_seed(int(plan.rng("autoencoder", step).integers(2**62)))
        posterior = autoencoder.encode(wanted).latent_dist
        decoded = autoencoder.decode(posterior.sample(generator)).sample
        weights = detail_weights(wanted)
        off = (decoded - wanted).abs()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        remark = f"l1 {off.detach().mean():.4f} kl {divergence:.2f} noise {posterior.std.mean():.3f}"
        return (weights * (off + off.square())).mean() + _KL_WEIGHT * divergence, remark

    run_stage(plan, trainee, loss_of_step)


def detail_weights(pictures: torch.Tensor) -> torch.Tensor:
    """What a pixel's error counts, (n, 1, 64, 64): more on things and around them, of mean 1 in each picture.

    A small star has a fiftieth of the pixels: unweighted, a flat background is learnt long before its points.
    """
    # No thing reaches into a corner.
    differs = (pictures - pictures[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.05
    near = torch.nn.functional.max_pool2d(differs.float(), 5, stride=1, padding=2)
    weights = 0.1 + near / near.mean(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    return weights / weights.mean(dim=(2, 3), keepdim=True)


@torch.no_grad()
def make_latents(plan: Plan) -> None:
    """Measure the latents, whiten them, and keep those of all scenes, (n, 4, 16, 16) float16."""
    path = plan.cache / "latents.npy"
    if path.exists():
        return
    autoencoder = make_autoencoder()
    autoencoder_trainee(plan, autoencoder).use_average()
    sample = [scene(plan, number) for number in range(min(plan.num_scenes, 512))]
    latents = autoencoder.encode(pictures(sample)).latent_dist.mean
    measured = {"mean": latents.mean(dim=(0, 2, 3)), "deviation": latents.std(dim=(0, 2, 3))}
    torch.save(measured, plan.cache / "whiten.pt")
    autoencoder = autoencoder_of(plan)
    kept = np.empty((plan.num_scenes, LATENT_CHANNELS, LATENT_SIDE, LATENT_SIDE), np.float16)
    for begin in range(0, plan.num_scenes, 64):
        numbers = range(begin, min(begin + 64, plan.num_scenes))
        batch = pictures([scene(plan, number) for number in numbers])
        kept[numbers.start : numbers.stop] = autoencoder.encode(batch).latent_dist.mean.half().numpy()
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, kept)
    part.replace(path)
    say(f"latents of {plan.num_scenes} scenes are in {path}")


def captions_of(
    plan: Plan, purpose: str, step: int, count: int
) -> tuple[npt.NDArray[np.int64], list[str], list[Asked]]:
    """Numbers of the step's scenes, a fresh caption of each, and what it asks for."""
    rng = plan.rng(purpose, step)
    numbers = rng.integers(plan.num_scenes, size=count)
    texts, asked = zip(*(caption(scene(plan, int(number)), rng) for number in numbers), strict=True)
    return numbers, list(texts), list(asked)


def text_trainee(plan: Plan, text_encoder: CLIPTextModel, questions: Questions) -> Trainee:
    path = plan.checkpoint("text")
    return Trainee(path, [text_encoder, questions], rate=1e-3, num_steps=plan.text_steps)


def train_text(plan: Plan) -> None:
    torch.manual_seed(plan.seed)
    tokenizer = make_tokenizer()
    text_encoder, questions = make_text_encoder(tokenizer), Questions()
    trainee = text_trainee(plan, text_encoder, questions)

    def loss_of_step(step: int) -> tuple[torch.Tensor, str]:
        _, texts, asked = captions_of(plan, "text", step, plan.text_batch)
        loss, read = text_loss(text_encoder, questions, tokenise(tokenizer, texts), answers(asked))
        return loss, f"read {read:.3f}"

    run_stage(plan, trainee, loss_of_step)


def text_encoder_of(plan: Plan, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The trained text encoder, which stays as it is beside the UNet."""
    text_encoder = make_text_encoder(tokenizer)
    text_trainee(plan, text_encoder, Questions())
    return text_encoder.eval().requires_grad_(False)


def denoiser_trainee(plan: Plan, unet: UNet2DConditionModel) -> Trainee:
    path = plan.checkpoint("denoiser")
    return Trainee(path, [unet], rate=plan.denoiser_rate, num_steps=plan.denoiser_steps, average=0.999)


def train_denoiser(plan: Plan) -> None:
    torch.manual_seed(plan.seed)
    tokenizer, unet = make_tokenizer(), make_unet()
    text_encoder, trainee = text_encoder_of(plan, tokenizer), denoiser_trainee(plan, unet)
    latents = np.load(plan.cache / "latents.npy", mmap_mode="r")
    alphas = make_scheduler().alphas_cumprod

    def loss_of_step(step: int) -> tuple[torch.Tensor, str]:
        numbers, texts, _ = captions_of(plan, "denoiser", step, plan.denoiser_batch)
        generator = torch.Generator().manual_seed(int(plan.rng("denoiser", step).integers(2**62)))
        kept = torch.rand(len(texts), generator=generator) >= _DROPPED
        tokens = tokenise(tokenizer, [text if keep else "" for text, keep in zip(texts, kept, strict=True)])
        clean = torch.from_numpy(latents[numbers].astype(np.float32))
        scenes = [scene(plan, int(number)) for number in numbers]
        return denoiser_loss(unet, text_encoder(tokens).last_hidden_state, clean, scenes, alphas, generator), ""

    run_stage(plan, trainee, loss_of_step)


def denoiser_loss(
    unet: UNet2DConditionModel,
    states: torch.Tensor,
    clean: torch.Tensor,
    scenes: list[Scene],
    alphas: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Squared error of the predicted v, over the timesteps of `draw_timesteps`, weighed by place.

    Args:
        states: text states, (n, 32, 128).
        clean: latents, (n, 4, 16, 16).
        scenes: what they show.
        alphas: the scheduler's cumulated products, (1000,).

    Source: Salimans and Ho, "Progressive Distillation" (v).
    """
    count = len(clean)
    timesteps = draw_timesteps(count, alphas, generator)
    noise = torch.randn(clean.shape, generator=generator)
    alpha = alphas[timesteps][:, None, None, None]
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    guess = unet(signal * clean + spread * noise, timesteps, states).sample
    off = (guess - (signal * noise - spread * clean)).square().mean(dim=1)
    return (latent_weights(scenes, alphas[timesteps]) * off).mean()


def latent_weights(scenes: list[Scene], alpha: torch.Tensor) -> torch.Tensor:
    """What an error counts by its place, (n, 16, 16), of mean 1: more on things and around them.

    Only where the latents are more signal than noise: there the network sees where the thing is. Elsewhere it has to
    guess, and weights that know the answer would draw its guess towards things.

    Args:
        alpha: the scheduler's cumulated products at the pictures' timesteps, (n,).
    """
    weights = torch.ones(len(scenes), LATENT_SIDE, LATENT_SIDE)
    middles = (torch.arange(LATENT_SIDE) + 0.5) * (SIDE / LATENT_SIDE)
    for each, scene_of, has_signal in zip(weights, scenes, alpha > 0.5, strict=True):
        for thing in scene_of.things if has_signal else ():
            reach = thing.extent + SIDE / LATENT_SIDE
            rows, columns = (middles - thing.y).abs() < reach, (middles - thing.x).abs() < reach
            each[rows[:, None] & columns] = 1 + _DETAIL_GAIN
    return weights / weights.mean(dim=(1, 2), keepdim=True)


def draw_timesteps(count: int, alphas: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(count,) int64, one from each of ``count`` equal parts of the timesteps' distribution.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", whose cap this is, as a density.
    """
    gain = 1 / (1 - alphas)  # 1 + SNR
    weights = gain.clamp(max=_MAX_GAIN) / gain
    heights = weights.cumsum(0) / weights.sum()
    places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return torch.searchsorted(heights, places).clamp(max=len(alphas) - 1)


def write_pipeline(plan: Plan) -> None:
    tokenizer, unet = make_tokenizer(), make_unet()
    trainee = denoiser_trainee(plan, unet)
    trainee.use_average()
    folder = plan.cache / "pipeline"
    save_pipeline(folder, autoencoder_of(plan), text_encoder_of(plan, tokenizer), unet, tokenizer)
    say(f"the pipeline after {trainee.step} steps is in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="folder of checkpoints, latents and the finished pipeline")
    parser.add_argument("--only", choices=STAGES, help="one stage instead of all in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--denoiser-steps", type=int, help="where the learning rate's cosine ends")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = Plan(cache=arguments.cache)
    if arguments.denoiser_steps:
        plan = replace(plan, denoiser_steps=arguments.denoiser_steps)
    run(plan, [arguments.only] if arguments.only else list(STAGES))


def run(plan: Plan, stages: list[str]) -> None:
    work = {
        "autoencoder": train_autoencoder,
        "latents": make_latents,
        "text": train_text,
        "denoiser": train_denoiser,
        "pipeline": write_pipeline,
    }
    plan.cache.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        say(f"stage {stage}")
        work[stage](plan)


if __name__ == "__main__":
    main()
