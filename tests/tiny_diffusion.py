"""Small diffusion models for everybody's tests: real graphs and a real tokenizer, milliseconds to build.

`make_diffusion_model` writes a whole entry of a model repository. A picture has 32 x 32 pixels, four by four for each
place of its latents. The UNet depends on every one of its inputs, row by row; the word ``<nan>`` of a prompt makes a
row's output NaN. What the VAE encodes and decodes again is the picture in blocks of one colour.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper, parser
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from sardonyx.repository import families, manifest

Layout = Literal["sd", "sdxl", "lcm"]
MAX_TOKENS = 24
"""Of a prompt: a byte each, and the two at its ends."""
SIDE = 32
SCALE = 4
WIDTH, WIDTH_2, POOLED_WIDTH, GUIDANCE_WIDTH = 6, 5, 7, 8
NOT_FINITE = "<nan>"
PREVIEW = [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5]]

_HEAD = '<ir_version: 10, opset_import: ["" : 21], producer_name: "sardonyx tests">\n'
_ENCODER = """
    encoder (int64[B,LENGTH] input_ids) => (float[B,LENGTH,WIDE] hidden POOLED_OUTPUT) {
        hidden = Gather<axis=0>(table, input_ids)
        POOLED
    }
"""
_POOLED = """
        means = ReduceMean<keepdims=0>(hidden, one)
        pooled = MatMul(means, pooler)
"""
_UNET = """
    unet (float[B,4,Y,X] sample, float[B] timestep, float[B,S,WIDE] encoder_hidden_states MORE_INPUTS)
        => (float[B,4,Y,X] noise_pred) {
        near = Conv<pads=[1, 1, 1, 1]>(sample, kernel)
        text = ReduceMean<keepdims=0>(encoder_hidden_states, one)
        from_text = MatMul(text, text_mixer)
        times = Unsqueeze(timestep, one)
        from_time = MatMul(times, time_mixer)
        sum_0 = Add(from_text, from_time)
        MORE
        shift = Unsqueeze(LAST, two_three)
        noise_pred = Add(near, shift)
    }
"""
_MORE_OF = {
    "sd": "",
    "sdxl": """
        from_pooled = MatMul(text_embeds, pooled_mixer)
        sum_1 = Add(sum_0, from_pooled)
        from_size = MatMul(time_ids, size_mixer)
        sum_2 = Add(sum_1, from_size)
    """,
    "lcm": """
        from_guidance = MatMul(timestep_cond, guidance_mixer)
        sum_1 = Add(sum_0, from_guidance)
    """,
}
_INPUTS_OF = {
    "sd": "",
    "sdxl": f", float[B,{POOLED_WIDTH}] text_embeds, float[B,6] time_ids",
    "lcm": f", float[B,{GUIDANCE_WIDTH}] timestep_cond",
}
_LAST_OF = {"sd": "sum_0", "sdxl": "sum_2", "lcm": "sum_1"}
_VAE_DECODER = """
    vae_decoder (float[B,4,Y,X] latents) => (float[B,3,YY,XX] image) {
        raw = ConvTranspose<strides=[4, 4]>(latents, spread, half)
        image = Clip(raw, zero, single)
    }
"""
_VAE_ENCODER = """
    vae_encoder (float[B,3,YY,XX] image) => (float[B,4,Y,X] mean, float[B,4,Y,X] std) {
        mean = Conv<strides=[4, 4]>(image, gather)
        std = Abs(mean)
    }
"""
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
    "lcm": {"_class_name": "LCMScheduler", "original_inference_steps": 50},
}
_TRAINED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_diffusion_model(
    repository_root: Path,
    name: str = "tiny",
    layout: Layout = "sd",
    *,
    has_vae_encoder: bool = True,
    has_preview: bool = True,
    default_steps: int = 4,
    config: str = "",
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a complete model and return its version folder.

    Args:
        config: further lines of ``config.pbtxt``.
        facts: fields of the manifest's ``diffusion`` that differ.
    """
    folder = repository_root / name / "1"
    folder.mkdir(parents=True)
    graphs = make_graphs(layout, has_vae_encoder=has_vae_encoder)
    for role, graph in graphs.items():
        onnx.save_model(graph, folder / f"{role}.onnx")
    files = ["scheduler_config.json"]
    (folder / files[0]).write_text(json.dumps(_SCHEDULERS[layout] | _TRAINED))
    described = make_facts(layout, has_preview=has_preview, default_steps=default_steps, **(facts or {}))
    for encoder in described.encoders:
        files.append(encoder.tokenizer)
        make_tokenizer().save(str(folder / encoder.tokenizer))
    entry = manifest.Manifest(
        family="diffusion",
        precision="fp32",
        source=manifest.Source(
            uri="tests/tiny_diffusion.py", architecture="StableDiffusionPipeline", licence="Apache-2.0"
        ),
        created="2026-01-01T00:00:00Z",
        graphs={role: manifest.Graph(model=_file(folder, f"{role}.onnx")) for role in graphs},
        files=[_file(folder, each) for each in files],
        diffusion=described,
    )
    (folder / manifest.FILE_NAME).write_bytes(manifest.encode(entry))
    config = f'name: "{name}"\nbackend: "onnxruntime"\n{config}\n'
    (folder.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    return folder


def make_facts(
    layout: Layout = "sd", *, has_preview: bool = True, default_steps: int = 4, **fields: Any
) -> families.Diffusion:
    """The manifest's part. `fields` are those that differ."""
    pad_id = make_tokenizer().token_to_id("<end>")
    encoders = [
        families.PromptEncoder(
            graph="text_encoder", tokenizer="tokenizer.json", max_tokens=MAX_TOKENS, pad_token_id=pad_id
        )
    ]
    if layout == "sdxl":
        encoders.append(
            families.PromptEncoder(
                graph="text_encoder_2",
                tokenizer="tokenizer_2.json",
                max_tokens=MAX_TOKENS,
                pad_token_id=0,
                has_pooled=True,
            )
        )
    values: dict[str, Any] = {
        "encoders": encoders,
        "latent_channels": 4,
        "pixels_per_latent": SCALE,
        "size": [SIDE, SIDE],
        "size_multiple": 8,
        "pooled_width": POOLED_WIDTH if layout == "sdxl" else None,
        "guidance_width": GUIDANCE_WIDTH if layout == "lcm" else None,
        "zeroes_empty_prompt": layout == "sdxl",
        "default_steps": default_steps,
        "default_guidance": 3.0,
        "preview": PREVIEW if has_preview else [],
    }
    return families.Diffusion(**values | fields)


def make_graphs(layout: Layout = "sd", *, has_vae_encoder: bool = True) -> dict[str, onnx.ModelProto]:
    """The graphs by role; the same in every call."""
    draw = np.random.default_rng(3)
    vocab_size = make_tokenizer().get_vocab_size()
    graphs = {"text_encoder": _text_encoder(draw, vocab_size, WIDTH, has_pooled=False)}
    if layout == "sdxl":
        graphs["text_encoder_2"] = _text_encoder(draw, vocab_size, WIDTH_2, has_pooled=True)
    graphs["unet"] = _unet(draw, layout)
    spread = np.zeros((4, 3, 4, 4), np.float32)
    gather = np.zeros((4, 3, 4, 4), np.float32)
    for channel in range(3):
        spread[channel, channel] = 0.5
        gather[channel, channel] = 1 / 16
    numbers = {"zero": np.float32(0), "single": np.float32(1), "half": np.full(3, 0.5, np.float32)}
    graphs["vae_decoder"] = _graph(_VAE_DECODER, {"spread": spread} | numbers)
    if has_vae_encoder:
        graphs["vae_encoder"] = _graph(_VAE_ENCODER, {"gather": gather})
    return graphs


def make_tokenizer() -> Tokenizer:
    """Every byte is a token; so are the two ends and `NOT_FINITE`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<start>", "<end>"])
    tokenizer.add_tokens([AddedToken(NOT_FINITE, special=False)])
    ends = [(end, tokenizer.token_to_id(end)) for end in ("<start>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return tokenizer


def picture_file(height: int = SIDE, width: int = SIDE, *, kind: str = "PNG", seed: int = 0) -> bytes:
    """An encoded picture: blocks of four by four pixels, each of one colour, so that the VAE keeps it."""
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    pixels = blocks.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def mask_file(height: int = SIDE, width: int = SIDE) -> bytes:
    """A PNG whose left half is transparent: there the picture is to change."""
    pixels = np.full((height, width, 4), 255, np.uint8)
    pixels[:, : width // 2, 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(data: bytes) -> npt.NDArray[np.uint8]:
    """Of an encoded picture, (Y, X, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _text_encoder(draw: np.random.Generator, vocab_size: int, width: int, *, has_pooled: bool) -> onnx.ModelProto:
    table = draw.standard_normal((vocab_size, width)).astype(np.float32)
    table[make_tokenizer().token_to_id(NOT_FINITE)] = np.nan
    text = _ENCODER.replace("LENGTH", str(MAX_TOKENS)).replace("WIDE", str(width))
    text = text.replace("POOLED_OUTPUT", f", float[B,{POOLED_WIDTH}] pooled" if has_pooled else "")
    constants = {"table": table}
    if has_pooled:
        constants |= {"one": np.array([1]), "pooler": draw.standard_normal((width, POOLED_WIDTH)).astype(np.float32)}
    return _graph(text.replace("POOLED", _POOLED if has_pooled else ""), constants)


def _unet(draw: np.random.Generator, layout: Layout) -> onnx.ModelProto:
    width = WIDTH + WIDTH_2 if layout == "sdxl" else WIDTH

    def mixer(rows: int, scale: float) -> npt.NDArray[np.float32]:
        return (draw.standard_normal((rows, 4)) * scale).astype(np.float32)

    kernel = (draw.standard_normal((4, 4, 3, 3)) * 0.03).astype(np.float32)
    kernel[range(4), range(4), 1, 1] += 0.8
    constants = {
        "one": np.array([1]),
        "two_three": np.array([2, 3]),
        "kernel": kernel,
        "text_mixer": mixer(width, 0.1),
        "time_mixer": mixer(1, 3e-4),
    }
    constants |= {
        "sd": {},
        "sdxl": {"pooled_mixer": mixer(POOLED_WIDTH, 0.05), "size_mixer": mixer(6, 3e-4)},
        "lcm": {"guidance_mixer": mixer(GUIDANCE_WIDTH, 0.02)},
    }[layout]
    text = _UNET.replace("WIDE", str(width)).replace("MORE_INPUTS", _INPUTS_OF[layout])
    return _graph(text.replace("MORE", _MORE_OF[layout]).replace("LAST", _LAST_OF[layout]), constants)


def _graph(text: str, constants: dict[str, Any]) -> onnx.ModelProto:
    model = parser.parse_model(_HEAD + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(each), name) for name, each in constants.items())
    return model


def _file(folder: Path, name: str) -> manifest.GraphFile:
    data = (folder / name).read_bytes()
    return manifest.GraphFile(path=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
