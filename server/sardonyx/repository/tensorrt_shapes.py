"""Shape profiles: between which sizes an engine of TensorRT is built, and for which one it is tuned.

Floor 1, pure. Without a profile the provider takes the first request's shape and builds again whenever another one
comes, for minutes and in the request's time. So every open axis of every input gets its bounds here, or the model is
refused. `tensorrt_bounds` says where the bounds come from.

Source: ONNX Runtime, docs/execution-providers/TensorRT-ExecutionProvider.md, "Explicit shape range".
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from sardonyx.repository.graph_check import GraphTensor

SHAPE_OPTIONS = ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes")
MAX_SIZE = (1 << 31) - 1

_SHAPE = re.compile(r"[0-9]{1,10}(?:x[0-9]{1,10})*")


class Bounds(msgspec.Struct, frozen=True):
    """Sizes of one axis; ``1 <= min <= opt <= max``."""

    min: int
    opt: int
    max: int


Profile = dict[str, tuple[Bounds, ...]]
"""By input, a bound for each axis."""
OpenBounds = Mapping[str, Sequence[Bounds | None]]
"""As `Profile`; ``None`` where nothing is known."""


def fixed(size: int) -> Bounds:
    """An axis that is always so long."""
    return Bounds(size, size, size)


def between(least: int, usual: int, most: int) -> Bounds:
    """An axis of `least` to `most`, mostly as near to `usual` as that allows."""
    assert 1 <= least <= most
    return Bounds(least, min(max(usual, least), most), most)


def read_profile(options: Mapping[str, str]) -> Profile:
    """The operator's own profile, of as many inputs as it names.

    Args:
        options: ONNX Runtime's; those of `SHAPE_OPTIONS` have the form ``x:1x3x224x224,y:1x4``.

    Raises:
        ValueError: one of the three is missing, or they do not fit each other. Names the option.
    """
    if not any(name in options for name in SHAPE_OPTIONS):
        return {}
    for name in SHAPE_OPTIONS:
        if name not in options:
            raise ValueError(f"{name} is missing; {', '.join(SHAPE_OPTIONS)} come together")
    least, usual, most = (_read_shapes(name, options[name]) for name in SHAPE_OPTIONS)
    for name, shapes in zip(SHAPE_OPTIONS[1:], (usual, most), strict=True):
        if odd := sorted(least.keys() ^ shapes.keys()):
            raise ValueError(f"{name}: names other inputs than {SHAPE_OPTIONS[0]}: see {odd[0]!r}")
    profile = {}
    for tensor, sizes in least.items():
        if not len(sizes) == len(usual[tensor]) == len(most[tensor]):
            raise ValueError(f"{SHAPE_OPTIONS[2]}: the three shapes of {tensor!r} have different numbers of axes")
        axes = list(zip(sizes, usual[tensor], most[tensor], strict=True))
        for axis, (low, opt, high) in enumerate(axes):
            if not 1 <= low <= opt <= high <= MAX_SIZE:
                raise ValueError(
                    f"{SHAPE_OPTIONS[2]}: axis {axis} of {tensor!r} has {low}, {opt} and {high}; they ascend from 1"
                )
        profile[tensor] = tuple(Bounds(*sizes) for sizes in axes)
    return profile


def derive_profile(inputs: Iterable[GraphTensor], known: OpenBounds, given: Profile) -> Profile:
    """A bound for every axis of every input that has an open one.

    Args:
        inputs: the graph's; -1 is an open axis. Initializers that a request may override have fixed shapes, and are
            left out.
        known: what the model's config or manifest says, with as many axes as the graph has.
        given: the operator's own, which replaces what is known of an input as long as it covers that.

    Raises:
        ValueError: an axis without bounds, a name that the option's format cannot carry, or a given shape that is not
            the graph's or too narrow.
    """
    profile: Profile = {}
    for tensor in inputs:
        if tensor.is_optional or -1 not in tensor.dims:
            continue
        if set(":,") & set(tensor.name):
            raise ValueError(f"input {tensor.name!r} has ':' or ',' in its name, which no shape profile can carry")
        axes = _axes(tensor, known.get(tensor.name))
        if tensor.name in given:
            _check_given(tensor, axes, given[tensor.name])
            profile[tensor.name] = given[tensor.name]
            continue
        for axis, bounds in enumerate(axes):
            if bounds is None:
                raise ValueError(
                    f"axis {axis} of input {tensor.name!r} has no bounds, for which an engine could be built: give its "
                    f"smallest, usual and largest shape in {', '.join(SHAPE_OPTIONS)}, as in '{_example(tensor)}'"
                )
        profile[tensor.name] = tuple(bounds for bounds in axes if bounds is not None)
    return profile


def profile_options(profile: Profile) -> dict[str, str]:
    """ONNX Runtime's options for a profile; none for graphs whose axes are all fixed."""
    if not profile:
        return {}
    return {
        option: ",".join(
            f"{tensor}:{'x'.join(str(getattr(bounds, side)) for bounds in axes)}" for tensor, axes in profile.items()
        )
        for option, side in zip(SHAPE_OPTIONS, ("min", "opt", "max"), strict=True)
    }


def _read_shapes(option: str, text: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for part in text.split(","):
        name, _, shape = part.strip().rpartition(":")
        if not name or ":" in name or _SHAPE.fullmatch(shape) is None:
            raise ValueError(f"{option}: {part.strip()!r} is no shape, such as 'x:1x3x224x224'")
        if name in shapes:
            raise ValueError(f"{option}: names {name!r} twice; one profile is offered")
        shapes[name] = [int(size) for size in shape.split("x")]
    return shapes


def _axes(tensor: GraphTensor, known: Sequence[Bounds | None] | None) -> list[Bounds | None]:
    """What the graph fixes, and for the rest what is known."""
    if known is not None and len(known) != len(tensor.dims):
        raise ValueError(f"input {tensor.name!r} of the graph has {len(tensor.dims)} axes, not {len(known)}")
    open_axes = known if known is not None else [None] * len(tensor.dims)
    return [fixed(dim) if dim >= 1 else bounds for dim, bounds in zip(tensor.dims, open_axes, strict=True)]


def _check_given(tensor: GraphTensor, axes: Sequence[Bounds | None], given: Sequence[Bounds]) -> None:
    if len(given) != len(axes):
        raise ValueError(f"{SHAPE_OPTIONS[0]}: {tensor.name!r} has {len(axes)} axes, not {len(given)}")
    for axis, (bounds, own) in enumerate(zip(axes, given, strict=True)):
        if bounds is not None and not (own.min <= bounds.min and bounds.max <= own.max):
            option = SHAPE_OPTIONS[0] if own.min > bounds.min else SHAPE_OPTIONS[2]
            raise ValueError(
                f"{option}: axis {axis} of {tensor.name!r} is {own.min} to {own.max}; the model takes {bounds.min} to "
                f"{bounds.max}"
            )
        if bounds is not None and bounds.min == bounds.max and own != bounds:
            raise ValueError(f"{SHAPE_OPTIONS[2]}: axis {axis} of {tensor.name!r} is always {bounds.max}")


def _example(tensor: GraphTensor) -> str:
    return f"{tensor.name}:{'x'.join('N' if dim == -1 else str(dim) for dim in tensor.dims)}"
