"""Diffusion pipelines: their parts loaded by `diffusers` and `transformers`, and each traced into a graph.

Needs the extra ``export-torch``, and says so. A pipeline's own code is never run, pickled weights are never read, and
nothing is fetched. What the graphs take and give: `sardonyx.repository.families.Diffusion`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sardonyx_export.errors import ExportError
from sardonyx_export.families.diffusion import DiffusionSpec
from sardonyx_export.plan import Precision, Target
from sardonyx_export.sources.pipeline_folder import ComponentWeights
from sardonyx_export.traced import quiet
from sardonyx_export.traced_graph import write_graph

_ROWS = 3
_HEIGHT, _WIDTH = 9, 13
"""Of the sample, in latents. Odd sizes make diffusers take those on the way up from those on the way down, which holds
for all others too; of even ones the trace would keep that every size doubles."""
_LATENTS = ("batch", None, "y", "x")
_PIXELS = ("batch", None, "height", "width")
_AXES: dict[str, tuple[str | None, ...]] = {
    "sample": _LATENTS,
    "noise_pred": _LATENTS,
    "encoder_hidden_states": ("batch", "tokens", None),
    "latents": _LATENTS,
    "mean": _LATENTS,
    "std": _LATENTS,
    "image": _PIXELS,
    "hidden": ("batch", None, None),
    "pooled": ("batch", None),
}
"""Of tensors by name; what is not listed has the rows first and nothing else that changes."""
_OUTPUTS = {"unet": ["noise_pred"], "vae_decoder": ["image"], "vae_encoder": ["mean", "std"]}


@dataclass(slots=True)
class Components:
    """The parts of a pipeline: torch modules in float32 and evaluation mode, and tokenizers of transformers."""

    unet: Any
    vae: Any
    text_encoders: dict[str, Any]
    """By role."""
    tokenizers: dict[str, Any]
    """By the name of the file that each becomes."""

    def of(self, role: str) -> Any:
        """The module behind a graph: ``vae`` of both ``vae_decoder`` and ``vae_encoder``."""
        if role in self.text_encoders:
            return self.text_encoders[role]
        return self.unet if role == "unet" else self.vae


def load_tokenizers(path: Path, spec: DiffusionSpec) -> dict[str, Any]:
    """The tokenizers of transformers, by the name of the file that each becomes.

    Raises:
        ExportError: the extra is not installed, or a tokenizer cannot be read.
    """
    try:
        import diffusers  # noqa: F401  # asked for here, so that it is missed before anything is written
        import onnxscript  # noqa: F401  # torch's exporter asks for it
        import transformers
    except ImportError as error:
        raise ExportError(
            f"a pipeline of diffusers needs a package that is missing ({error.name}); install sardonyx[export-torch]"
        ) from error
    found = {}
    for file, name in spec.tokenizers.items():
        if not any((path / name / each).is_file() for each in ("vocab.json", "tokenizer.json")):
            raise ExportError("is missing", file=f"{name}/vocab.json")
        try:
            with quiet():
                found[file] = transformers.CLIPTokenizer.from_pretrained(path / name, local_files_only=True)
        except Exception as error:  # whatever a foreign library says of files that it does not read
            raise ExportError(f"cannot be read: {_first_line(error)}", file=name) from error
    return found


def tokenizer_json(tokenizer: Any) -> bytes:
    """A tokenizer as the server reads it, without padding and truncation of its own."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return str(backend.to_str(pretty=False)).encode()


def load_components(
    path: Path, spec: DiffusionSpec, weights: Mapping[str, ComponentWeights], tokenizers: dict[str, Any]
) -> Components:
    """Load all modules in float32.

    Raises:
        ExportError: a library does not load a part, or a part lacks weights.
    """
    import diffusers
    import transformers

    loaded = {}
    classes: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for encoder in spec.facts.encoders:
        name = "CLIPTextModelWithProjection" if encoder.has_pooled else "CLIPTextModel"
        classes[encoder.graph] = getattr(transformers, name)
    for part, model_class in classes.items():
        loaded[part] = _load(path, part, model_class, weights[part].variant)
    return Components(unet=loaded.pop("unet"), vae=loaded.pop("vae"), text_encoders=loaded, tokenizers=tokenizers)


def _load(path: Path, part: str, model_class: Any, variant: str | None) -> Any:
    import torch

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if part in ("unet", "vae"):
        options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                path / part,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever a foreign library says of a folder that it does not load
        raise ExportError(f"{model_class.__name__} cannot be loaded: {_first_line(error)}", file=part) from error
    missing = sorted(key for key in info["missing_keys"] if not key.endswith("position_ids"))
    if missing or info.get("mismatched_keys"):
        named = ", ".join(map(str, missing[:4] or sorted(info["mismatched_keys"])[:4]))
        raise ExportError(f"lacks weights of {model_class.__name__}: {named}", file=part)
    return model.eval()


def component_module(role: str, components: Components, spec: DiffusionSpec, dtype: Any, names: list[str]) -> Any:
    """The torch module of a graph.

    Args:
        role: of the graph.
        components: of the pipeline.
        spec: of the pipeline.
        dtype: what the part computes in, and has to be in.
        names: of the inputs that it will be called with, in their order.
    """
    from sardonyx_export import diffusion_modules

    part = components.of(role)
    match role:
        case "unet":
            return diffusion_modules.UnetModule(part, dtype, names).eval()
        case "vae_decoder":
            return diffusion_modules.VaeDecoderModule(part, dtype).eval()
        case "vae_encoder":
            return diffusion_modules.VaeEncoderModule(part, dtype).eval()
        case _:
            encoder = next(each for each in spec.facts.encoders if each.graph == role)
            return diffusion_modules.PromptEncoderModule(
                part, is_penultimate=spec.layout == "sdxl", has_pooled=encoder.has_pooled
            ).eval()


def sample_inputs(
    role: str, components: Components, spec: DiffusionSpec, sizes: tuple[int, int, int], seed: int
) -> dict[str, Any]:
    """Inputs of a graph as torch tensors by name, the same for the same seed.

    Args:
        role: of the graph.
        components: of the pipeline.
        spec: of the pipeline.
        sizes: rows, and height and width in latents.
        seed: of the numbers.
    """
    import torch

    facts = spec.facts
    rows, height, width = sizes
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=source)

    latents = (rows, facts.latent_channels, height, width)
    if role == "vae_decoder":
        return {"latents": normal(*latents)}
    if role == "vae_encoder":
        scale = facts.pixels_per_latent
        return {"image": torch.rand((rows, 3, height * scale, width * scale), generator=source) * 2 - 1}
    if role != "unet":
        encoder = next(each for each in facts.encoders if each.graph == role)
        size = components.of(role).config.vocab_size
        return {"input_ids": torch.randint(0, size, (rows, encoder.max_tokens), generator=source)}
    tokens = facts.encoders[0].max_tokens
    inputs = {
        "sample": normal(*latents),
        "timestep": torch.randint(0, 1000, (rows,), generator=source).float(),
        "encoder_hidden_states": normal(rows, tokens, components.unet.config.cross_attention_dim),
    }
    if facts.pooled_width is not None:
        pixels = torch.tensor([height, width], dtype=torch.float32) * facts.pixels_per_latent
        inputs["text_embeds"] = normal(rows, facts.pooled_width)
        inputs["time_ids"] = torch.cat([pixels, torch.zeros(2), pixels]).repeat(rows, 1)
    if facts.guidance_width is not None:
        inputs["timestep_cond"] = normal(rows, facts.guidance_width)
    return inputs


def export_component(
    role: str, components: Components, spec: DiffusionSpec, folder: Path, precision: Precision, target: Target = "cpu"
) -> list[str]:
    """Trace one part. A module that goes to half precision stays there.

    Args:
        role: of the graph.
        components: of the pipeline.
        spec: of the pipeline.
        folder: gets the graph and its data.
        precision: of weights and arithmetic; inputs and outputs are float32.
        target: whose operators the graph has.

    Returns:
        The names of both files, the graph first.

    Raises:
        ExportError: it cannot be traced.
    """
    import torch

    dtype = torch.float16 if precision == "fp16" else torch.float32
    with quiet():
        components.of(role).to(dtype)
    inputs = sample_inputs(role, components, spec, (_ROWS, _HEIGHT, _WIDTH), seed=0)
    axes = {name: _AXES.get(name, ("batch", *[None] * (value.ndim - 1))) for name, value in inputs.items()}
    outputs = _OUTPUTS.get(role, ["hidden"])
    if any(encoder.graph == role and encoder.has_pooled for encoder in spec.facts.encoders):
        outputs = ["hidden", "pooled"]
    module = component_module(role, components, spec, dtype, list(inputs))
    with quiet():
        return write_graph(
            module,
            inputs,
            outputs,
            folder / f"{role}.onnx",
            axes=axes | {name: _AXES[name] for name in outputs},
            target=target,
        )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"


def library_name() -> str:
    """As the manifest names what a pipeline was compared with."""
    import diffusers

    return f"diffusers {diffusers.__version__}"
