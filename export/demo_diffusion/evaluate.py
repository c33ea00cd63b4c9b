"""Ask a pipeline folder for pictures of prompts it was not trained on word for word, and judge them by their pixels.

    python export/demo_diffusion/evaluate.py .cache/demo-diffusion/pipeline
    python export/demo_diffusion/evaluate.py http://127.0.0.1:8000 --model shapes-64 --into /tmp/served

Writes `evaluation.json` and contact sheets, the first `sheet.png`, beside the folder or into another one.
"""

import argparse
import base64
import io
import json
import logging
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import httpx
import numpy as np
import numpy.typing as npt
import torch
import transformers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from demo_diffusion.captions import Asked, AskedThing, caption, phrase_of
from demo_diffusion.judge import Verdict, judge, look
from demo_diffusion.scenes import COLOURS, NEUTRAL, RELATIONS, SHAPES, draw, sample_scene

SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}
_SEED = 1_000_003
"""Far from every seed of the training."""
_BATCH = 25
_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_SHEET = (
    "a red circle",
    "a blue square",
    "a yellow star on a black background",
    "two white rings",
    "a big green triangle",
    "a small pink heart",
    "a purple diamond on a yellow background",
    "an orange cross",
    "a small blue square and a big green triangle",
    "a red circle left of a blue star",
    "a yellow heart above a purple ring",
    "a white cross below a cyan diamond on a black background",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str
    asked: Asked


def prompts(count: int, num_things: int) -> list[Prompt]:
    """Prompts of one or two things, the same at every call; shapes take turns, all else is drawn from a seed."""
    rng = np.random.default_rng([_SEED, num_things])
    made = []
    for number in range(count):
        background = str(rng.choice([*NEUTRAL, *COLOURS])) if rng.random() < 0.5 else None
        # A thing in the colour of an unsaid background would have to be refused, so none is asked for in grey.
        colours = [name for name in COLOURS if name != background and (background or name not in NEUTRAL)]
        things = [_ask(SHAPES[(number + turn * 3) % len(SHAPES)], colours, rng) for turn in range(num_things)]
        relation = str(rng.choice(RELATIONS)) if num_things == 2 and rng.random() < 0.6 else None
        link = f" {_WORDS[relation] if relation else 'and'} "
        text = link.join(phrase_of(thing) for thing in things)
        if background:
            text += f" on {'an' if background[0] in 'aeiou' else 'a'} {background} background"
        made.append(Prompt(text, Asked(tuple(things), relation, background)))
    return made


def _ask(shape: str, colours: list[str], rng: np.random.Generator) -> AskedThing:
    size = str(rng.choice(("small", "big"))) if rng.random() < 0.4 else None
    return AskedThing(shape, str(rng.choice(colours)), size)


Painter = Callable[[list[str], int], npt.NDArray[np.uint8]]
"""Prompts and a seed to pictures, (n, 64, 64, 3)."""


def paint_at(
    url: str, model: str, texts: list[str], *, steps: int, guidance: float, seed: int
) -> npt.NDArray[np.uint8]:
    """As `paint`, by a server that speaks OpenAI's API."""
    made = []
    for number, text in enumerate(texts):
        body = {
            "model": model,
            "prompt": text,
            "seed": seed * 100_000 + number,
            "steps": steps,
            "guidance_scale": guidance,
            "response_format": "b64_json",
        }
        response = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60.0)
        (answer,) = response.raise_for_status().json()["data"]
        made.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))).convert("RGB")))
    return np.stack(made)


def paint(
    pipeline: StableDiffusionPipeline, texts: list[str], *, steps: int, guidance: float, seed: int = 0
) -> npt.NDArray[np.uint8]:
    """Pictures of prompts, (n, 64, 64, 3) uint8; each has a generator of its own, seeded by its number."""
    made = []
    for begin in range(0, len(texts), _BATCH):
        batch = texts[begin : begin + _BATCH]
        generators = [torch.Generator().manual_seed(seed * 100_000 + begin + number) for number in range(len(batch))]
        result = pipeline(
            batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="np"
        )
        made.append((result.images * 255).round().astype(np.uint8))
    return np.concatenate(made)


def rates(verdicts: list[Verdict]) -> dict[str, float | int]:
    """Shares in percent, each of the pictures that were asked for something of the kind, and how many those were."""
    summary: dict[str, float | int] = {"pictures": len(verdicts)}
    for name in ("present", "exact", "sizes", "relation", "background"):
        asked = [getattr(each, name) for each in verdicts if getattr(each, name) is not None]
        if asked:
            summary[f"{name}_percent"] = round(100 * sum(asked) / len(asked), 1)
            summary[f"{name}_asked"] = len(asked)
    return summary


def judge_of_clean_renders(count: int) -> dict[str, float | int]:
    """What the judge says of drawn scenes held against their own captions: its own error."""
    verdicts = []
    for number in range(count):
        rng = np.random.default_rng([_SEED, 3, number])
        scene = sample_scene(rng)
        verdicts.append(judge(caption(scene, rng)[1], look(draw(scene))))
    return rates(verdicts)


def failures(made: list[Prompt], verdicts: list[Verdict], pictures: npt.NDArray[np.uint8]) -> list[dict[str, object]]:
    """What was asked and what was seen wherever a thing is missing."""
    return [
        {"prompt": prompt.text, "seen": asdict(look(picture))}
        for prompt, verdict, picture in zip(made, verdicts, pictures, strict=True)
        if not verdict.present
    ]


def sheet(pictures: npt.NDArray[np.uint8], texts: list[str], columns: int) -> Image.Image:
    """Pictures at double size in rows, each under its prompt."""
    width, height, head = 136, 164, 28
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (width * columns, height * rows), "white")
    pen = ImageDraw.Draw(page)
    for number, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = number % columns * width, number // columns * height
        image = Image.fromarray(picture).resize((128, 128), Image.Resampling.NEAREST)
        page.paste(image, (x + 4, y + head))
        half = text.rfind(" ", 0, 26) if len(text) > 25 else len(text)
        pen.text((x + 4, y + 2), f"{text[:half]}\n{text[half:].strip()[:25]}", fill="black", font_size=10)
    return page


def open_pipeline(folder: Path, scheduler: str) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def evaluate(paint_all: Painter, count: int, renders: int, folder: Path) -> dict[str, object]:
    """Judge pictures of one and of two things, and draw the sheets into a folder."""
    result: dict[str, object] = {"judge_on_clean_renders": judge_of_clean_renders(renders)}
    for name, num_things in (("one_thing", 1), ("two_things", 2)):
        made = prompts(count, num_things)
        texts = [each.text for each in made]
        pictures = paint_all(texts, 0)
        verdicts = [judge(each.asked, look(picture)) for each, picture in zip(made, pictures, strict=True)]
        result[name] = {**rates(verdicts), "failures": failures(made, verdicts, pictures)}
        sys.stdout.write(f"{name}: {rates(verdicts)}\n")
        sheet(pictures[:40], texts[:40], 8).save(folder / f"sheet-{name.replace('_', '-')}.png")
    texts = [text for text in _SHEET for _ in range(4)]
    sheet(paint_all(texts, 7), texts, 8).save(folder / "sheet.png")
    return result


def facts_of(pipeline: StableDiffusionPipeline) -> dict[str, object]:
    parts = ("text_encoder", "unet", "vae")
    return {
        "parameters": {name: sum(each.numel() for each in getattr(pipeline, name).parameters()) for name in parts},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a pipeline's folder, or a server's address")
    parser.add_argument("--model", help="of the server")
    parser.add_argument("--into", type=Path, help="a folder for what is written")
    parser.add_argument("--count", type=int, default=100, help="pictures with one thing, and as many with two")
    parser.add_argument("--renders", type=int, default=1000, help="clean renders that the judge itself is tried on")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), default="ddim", help="of a pipeline")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    steps, guidance = arguments.steps, arguments.guidance
    said: dict[str, object] = {"steps": steps, "guidance": guidance}
    if arguments.source.startswith("http"):
        folder = arguments.into or Path()

        def paint_all(texts: list[str], seed: int) -> npt.NDArray[np.uint8]:
            return paint_at(arguments.source, arguments.model, texts, steps=steps, guidance=guidance, seed=seed)
    else:
        source = Path(arguments.source).resolve()
        folder = arguments.into or source.parent
        torch.set_num_threads(arguments.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.simplefilter("ignore", FutureWarning)
        pipeline = open_pipeline(source, arguments.scheduler)
        said |= {"scheduler": arguments.scheduler, **facts_of(pipeline)}

        def paint_all(texts: list[str], seed: int) -> npt.NDArray[np.uint8]:
            return paint(pipeline, texts, steps=steps, guidance=guidance, seed=seed)

    folder.mkdir(parents=True, exist_ok=True)
    result = said | evaluate(paint_all, arguments.count, arguments.renders, folder)
    path = folder / "evaluation.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
