"""LoRA files merged into a pipeline's weights: ``W + scale * alpha / rank * up @ down``.

Reads the names that diffusers and peft write (``unet.down_blocks.0...to_q.lora_A.weight``) and kohya's scripts
(``lora_unet_down_blocks_0_..._to_q.lora_down.weight``). Whatever else is in a file is refused: a style that is merged
in part would look like a bad model.
"""

import re
from collections.abc import Mapping
from typing import Any

from sardonyx_export.errors import ExportError
from sardonyx_export.request import Lora
from sardonyx_export.sources.safetensors_file import SafetensorsTensor, read_header
from sardonyx_export.traced_diffusion import Components

_MATRIX = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])(?:\.default)?|lora_(?P<kohya>down|up)"
    r"|(?:lora|lora_linear_layer)\.(?P<diffusers>down|up))\.weight"
)
_PROCESSOR = re.compile(r"(?P<module>.+)\.processor\.(?P<part>to_\w+)_lora\.(?P<side>down|up)\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_PREFIXES = (
    ("unet.", "unet"),
    ("lora_unet_", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("lora_te2_", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te_", "text_encoder"),
)


def merge_lora(components: Components, lora: Lora) -> int:
    """Change the weights in place.

    Returns:
        How many matrices were changed.

    Raises:
        ExportError: no safetensors file, a key that is not understood or leads nowhere in this pipeline, a lone half
            of a pair, or shapes that do not fit.
    """
    if not lora.path.is_file() or lora.path.suffix != ".safetensors":
        raise ExportError("is no .safetensors file", file=lora.path.name, field="--lora")
    pairs, alphas = _sort(read_header(lora.path), lora.path.name)
    targets = _targets(components)
    for name, sides in pairs.items():
        module = targets.get(name)
        if module is None:
            raise ExportError(
                f"changes {name}, which this pipeline has not; names as diffusers or kohya write them are read",
                file=lora.path.name,
            )
        if set(sides) != {"down", "up"}:
            raise ExportError(f"has no {'up' if 'down' in sides else 'down'} matrix", file=lora.path.name, field=name)
        alpha = alphas.pop(name, None)
        _merge(module, sides["down"], sides["up"], None if alpha is None else float(alpha.read().sum()), lora.scale)
    if alphas or not pairs:
        raise ExportError("holds no pairs of matrices" if not pairs else "has no matrices", file=lora.path.name)
    return len(pairs)


def _sort(
    tensors: Mapping[str, SafetensorsTensor], file: str
) -> tuple[dict[str, dict[str, SafetensorsTensor]], dict[str, SafetensorsTensor]]:
    """The two matrices of each module, and the alphas, by part and module."""
    pairs: dict[str, dict[str, SafetensorsTensor]] = {}
    alphas: dict[str, SafetensorsTensor] = {}
    for key, tensor in tensors.items():
        if (found := _PROCESSOR.fullmatch(key)) is not None:
            part = "to_out.0" if found["part"] == "to_out" else found["part"]
            pairs.setdefault(_flat(f"{found['module']}.{part}", key, file), {})[found["side"]] = tensor
        elif (found := _MATRIX.fullmatch(key)) is not None:
            side = found["kohya"] or found["diffusers"] or {"A": "down", "B": "up"}[found["letter"]]
            pairs.setdefault(_flat(found["module"], key, file), {})[side] = tensor
        elif (found := _ALPHA.fullmatch(key)) is not None:
            alphas[_flat(found["module"], key, file)] = tensor
        else:
            raise ExportError("is no part of a plain LoRA", file=file, field=key)
    return pairs, alphas


def _flat(module: str, key: str, file: str) -> str:
    """``unet/down_blocks_0_attentions_0``, whichever way a file writes it."""
    for prefix, part in _PREFIXES:
        if module.startswith(prefix):
            name = module.removeprefix(prefix).replace(".", "_")
            return f"{part}/{name.removeprefix('text_model_')}"
    raise ExportError("belongs to no part of a pipeline", file=file, field=key)


def _targets(components: Components) -> dict[str, Any]:
    """Every module with a matrix or a convolution, under the names of `_flat`."""
    parts = {"unet": components.unet, **components.text_encoders}
    return {
        f"{part}/{name.replace('.', '_').removeprefix('text_model_')}": module
        for part, model in parts.items()
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim in (2, 4)
    }


def _merge(module: Any, down: SafetensorsTensor, up: SafetensorsTensor, alpha: float | None, scale: float) -> None:
    import torch

    weight = module.weight
    rank = down.shape[0] if down.shape else 0
    first, second = torch.from_numpy(down.read()), torch.from_numpy(up.read())
    if rank < 1 or second.shape[:2].numel() != second.numel() or second.shape[1:2] != (rank,):
        raise ExportError(f"has the shape {up.shape} beside one of {down.shape}", file=up.path.name, field=up.name)
    change = second.flatten(1) @ first.flatten(1)
    if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
        raise ExportError(
            f"makes {tuple(change.shape)} with its pair; the model has {tuple(weight.shape)}",
            file=up.path.name,
            field=up.name,
        )
    with torch.no_grad():
        weight.add_(change.view_as(weight), alpha=scale * (1.0 if alpha is None else alpha / rank))
