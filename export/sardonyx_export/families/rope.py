"""Rotary position embeddings: from a configuration's many spellings to tables of frequencies.

Reads today's ``rope_parameters`` and the older ``rope_theta`` with ``rope_scaling``. Arithmetic is float32 in the order
that `transformers` uses, so that long positions round alike.

Source: transformers 5.23, ``modeling_rope_utils.py``.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import msgspec
import numpy as np
import numpy.typing as npt

from sardonyx_export.families.config import ConfigReader
from sardonyx_export.spec import Rope

Frequencies = npt.NDArray[np.float32]

# ONNX Runtime 1.32 refuses others: "cos_cache dimension 1 must be <= head_size / 2 and a multiple of 8".
_ROTARY_MULTIPLE = 16


class RopeContext(msgspec.Struct, frozen=True, kw_only=True):
    """What scaling methods need to know beside their own section."""

    rotary_size: int
    """Leading elements of a head that are rotated."""
    theta: float
    """Base of the geometric series."""
    max_positions: int
    """The configuration's ``max_position_embeddings``."""
    original_positions: int
    """Positions of the pretraining."""
    max_model_len: int
    """Positions that this export will serve."""

    def wavelengths(self) -> Frequencies:
        """The series that every method starts from: theta ** (2i / rotary_size)."""
        exponents = np.arange(0, self.rotary_size, 2, dtype=np.float32) / np.float32(self.rotary_size)
        series: Frequencies = np.power(np.float32(self.theta), exponents)
        return series


def read_rope(
    config: ConfigReader,
    head_size: int,
    max_model_len: int,
    *,
    is_partial: bool = False,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Rope:
    """The model's rotary embedding, where all layers share one.

    Args:
        config: top level of the configuration; ``max_position_embeddings`` is read from it.
        head_size: elements of a head.
        max_model_len: positions that this export will serve; longrope chooses its factors by it.
        is_partial: the architecture knows ``partial_rotary_factor``.
        aliases: older names of scaling methods that the architecture used.

    Raises:
        ExportError: a method or a parameter that is not implemented.
    """
    theta = config.number("rope_theta", 10_000.0)
    # transformers lets an old section win over a new one; both may hold copies of the top level's values.
    sections = [config.section("rope_scaling"), config.section("rope_parameters")]
    section = sections[0] or sections[1] or ConfigReader({})
    partial = section.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if partial != 1 and not is_partial:
        raise config.refusal("partial_rotary_factor", f"is {partial}, which this architecture does not have")
    original = config.optional_integer("original_max_position_embeddings")
    return rope_from_section(
        config, section, int(head_size * partial), max_model_len, theta=theta, original=original, aliases=aliases
    )


def rope_from_section(
    config: ConfigReader,
    section: ConfigReader,
    rotary_size: int,
    max_model_len: int,
    *,
    theta: float,
    original: int | None = None,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Rope:
    """A rotary embedding from one section of parameters, which is read to its end. An empty section scales nothing.

    Args:
        config: top level of the configuration.
        section: of the method's parameters; its ``rope_theta`` wins over `theta`.
        rotary_size: leading elements of a head that are rotated.
        max_model_len: positions that this export will serve.
        theta: base where the section has none.
        original: positions of the pretraining, where the top level says so; it wins over the section.
        aliases: older names of scaling methods.
    """
    kinds = [section.raw("rope_type"), section.raw("type")]
    kind = kinds[0] or kinds[1] or "default"
    kind = aliases.get(kind, kind)
    if kind not in _METHODS:
        raise section.refusal("rope_type", f"is {kind!r}; supported: {', '.join(sorted(_METHODS))}")
    if rotary_size % _ROTARY_MULTIPLE:
        raise config.refusal(
            "partial_rotary_factor",
            f"gives {rotary_size} rotated elements a head; the kernel needs a multiple of {_ROTARY_MULTIPLE}",
        )
    max_positions = config.integer("max_position_embeddings")
    stored = section.integer("original_max_position_embeddings", max_positions)
    context = RopeContext(
        rotary_size=rotary_size,
        theta=section.number("rope_theta", theta),
        max_positions=max_positions,
        original_positions=original or stored,
        max_model_len=max_model_len,
    )
    frequencies, attention_factor = _METHODS[kind](section, context)
    section.finish()
    return Rope(
        rotary_size=rotary_size,
        inverse_frequencies=tuple(frequencies.astype(np.float32).tolist()),
        attention_factor=attention_factor,
    )


def _default(section: ConfigReader, context: RopeContext) -> tuple[Frequencies, float]:
    return np.float32(1) / context.wavelengths(), 1.0


def _linear(section: ConfigReader, context: RopeContext) -> tuple[Frequencies, float]:
    return np.float32(1) / context.wavelengths() / np.float32(section.number("factor")), 1.0


def _llama3(section: ConfigReader, context: RopeContext) -> tuple[Frequencies, float]:
    """Slow waves are stretched by ``factor``, fast ones kept, those between interpolated."""
    factor = section.number("factor")
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    frequencies = np.float32(1) / context.wavelengths()
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = (context.original_positions / wavelengths - np.float32(low)) / np.float32(high - low)
    mixed = (1 - smooth) * frequencies / np.float32(factor) + smooth * frequencies
    slow, fast = wavelengths > context.original_positions / low, wavelengths < context.original_positions / high
    return np.where(slow, frequencies / np.float32(factor), np.where(fast, frequencies, mixed)), 1.0


def _yarn(section: ConfigReader, context: RopeContext) -> tuple[Frequencies, float]:
    """From extrapolation to interpolation by a ramp over the dimensions; attention's temperature is corrected."""
    factor = section.number("factor", context.max_positions / context.original_positions)
    mscale, mscale_all = section.optional_number("mscale"), section.optional_number("mscale_all_dim")
    attention_factor = section.optional_number("attention_factor")
    if attention_factor is None:
        both = mscale is not None and mscale_all is not None
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all) if both else _mscale(factor, 1.0)
    truncate = section.flag("truncate", True)

    def border(rotations: float) -> float:
        turns = context.original_positions / (rotations * 2 * math.pi)
        return context.rotary_size * math.log(turns) / (2 * math.log(context.theta))

    low, high = border(section.number("beta_fast", 32.0)), border(section.number("beta_slow", 1.0))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, context.rotary_size - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(context.rotary_size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    wavelengths = context.wavelengths()
    interpolated = np.float32(1) / (np.float32(factor) * wavelengths)
    return interpolated * (1 - kept) + np.float32(1) / wavelengths * kept, attention_factor


def _mscale(factor: float, scale: float | None) -> float:
    return 0.1 * (scale or 1.0) * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(section: ConfigReader, context: RopeContext) -> tuple[Frequencies, float]:
    """One stretch factor per frequency: the short list up to the pretraining's length, the long list beyond.

    `transformers` chooses anew whenever a sequence crosses that length, which would invalidate a cache; here the export
    chooses once, by the longest sequence that it will serve.
    """
    num_frequencies = context.rotary_size // 2
    stretches = {name: section.numbers(name, num_frequencies) for name in ("short_factor", "long_factor")}
    chosen = "long_factor" if context.max_model_len > context.original_positions else "short_factor"
    factor = section.number("factor", context.max_positions / context.original_positions)
    attention_factor = section.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0
        if factor > 1:
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(context.original_positions))
    return np.float32(1) / (np.array(stretches[chosen], np.float32) * context.wavelengths()), attention_factor


_METHODS: dict[str, Callable[[ConfigReader, RopeContext], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
