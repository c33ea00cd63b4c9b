"""What TensorRT 10 and 11 do not have in common, as far as a model's options ask for it.

Floor 1, pure. TensorRT 11 knows strongly typed networks only: what is computed in which type is the graph's to say, so
options that let the builder choose are gone with calibration and per-layer precisions. An option that does nothing
would leave an operator with a model of another speed or precision than asked for; so it is refused.

Source: NVIDIA, "Migrating from TensorRT 10.x to 11.x" (C++ API, Jetson/JetPack), TensorRT 11.0 to 11.4.1.
"""

from collections.abc import Mapping

import msgspec

Version = tuple[int, int, int]
"""Major, minor, patch."""

OLDEST: Version = (10, 0, 0)
_TYPED: Version = (11, 0, 0)


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """An option that some versions do not have."""

    option: str
    """ONNX Runtime's."""
    parameter: str
    """As config.pbtxt calls it."""
    since: Version
    until: Version | None = None
    """The first version that has it again."""
    words: frozenset[str] = frozenset()
    """Only where the value names one of these, without sign, between commas."""
    instead: str
    """What an operator does."""


_IN_GRAPH = "export the graph in that precision, which both versions take"
_QUANTIZE = "quantise the graph with QuantizeLinear and DequantizeLinear nodes"
_ON_GPU = "leave it out, and all runs on the GPU"

MISSING = (
    Missing(option="trt_fp16_enable", parameter="precision_mode FP16", since=_TYPED, instead=_IN_GRAPH),
    Missing(option="trt_bf16_enable", parameter="precision_mode BF16", since=_TYPED, instead=_IN_GRAPH),
    Missing(option="trt_int8_enable", parameter="precision_mode INT8", since=_TYPED, instead=_QUANTIZE),
    Missing(
        option="trt_int8_calibration_table_name",
        parameter="int8_calibration_table_name",
        since=_TYPED,
        instead=_QUANTIZE,
    ),
    Missing(
        option="trt_int8_use_native_calibration_table",
        parameter="int8_use_native_calibration_table",
        since=_TYPED,
        instead=_QUANTIZE,
    ),
    Missing(
        option="trt_layer_norm_fp32_fallback",
        parameter="trt_layer_norm_fp32_fallback",
        since=_TYPED,
        instead="export normalisations in FP32, between Cast nodes",
    ),
    Missing(
        option="trt_tactic_sources",
        parameter="trt_tactic_sources",
        since=_TYPED,
        words=frozenset({"CUBLAS", "CUBLAS_LT", "CUDNN"}),
        instead="leave these sources out",
    ),
    # 10.7 was the last 10.x with it; 11.4.1 has it again, on Jetson AGX Orin.
    Missing(option="trt_dla_enable", parameter="trt_dla_enable", since=(10, 8, 0), until=(11, 4, 1), instead=_ON_GPU),
    Missing(option="trt_dla_core", parameter="trt_dla_core", since=(10, 8, 0), until=(11, 4, 1), instead=_ON_GPU),
)


def check_version(options: Mapping[str, str], version: Version) -> None:
    """Refuse options that this version does not have.

    Args:
        options: ONNX Runtime's. A flag that is ``0`` asks for nothing.
        version: of the library that the provider was built for.

    Raises:
        ValueError: names the parameter and the way out.
    """
    if version < OLDEST:
        raise ValueError(f"TensorRT {shown(version)} is too old; versions from {shown(OLDEST)} on are used")
    for each in MISSING:
        value = options.get(each.option)
        if value is None or (value == "0" and each.option != "trt_dla_core"):
            continue
        if each.option == "trt_dla_core" and options.get("trt_dla_enable") != "1":
            continue
        if version < each.since or (each.until is not None and version >= each.until):
            continue
        if each.words and not each.words & {word.strip().lstrip("+-") for word in value.split(",")}:
            continue
        raise ValueError(f"{each.parameter} is not part of TensorRT {shown(version)}: {each.instead}")


def shown(version: Version) -> str:
    """As people write it: ``10.13.2``."""
    return ".".join(map(str, version))
