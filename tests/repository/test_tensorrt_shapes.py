import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.repository.graph_check import GraphTensor
from sardonyx.repository.tensorrt_shapes import (
    SHAPE_OPTIONS,
    Bounds,
    between,
    derive_profile,
    fixed,
    profile_options,
    read_profile,
)

ROWS = Bounds(1, 4, 8)


def tensor(name: str, *dims: int, is_optional: bool = False) -> GraphTensor:
    return GraphTensor(name, 11, dims, is_optional)


def options(least: str, usual: str, most: str) -> dict[str, str]:
    return dict(zip(SHAPE_OPTIONS, (least, usual, most), strict=True))


def test_profile_has_a_bound_for_each_axis_of_each_open_input():
    inputs = [tensor("x", -1, 3, -1), tensor("y", -1), tensor("z", 2, 2)]
    profile = derive_profile(inputs, {"x": (ROWS, None, fixed(7)), "y": (ROWS,)}, {})
    assert profile == {"x": (ROWS, fixed(3), fixed(7)), "y": (ROWS,)}
    assert profile_options(profile) == options("x:1x3x7,y:1", "x:4x3x7,y:4", "x:8x3x7,y:8")


def test_graph_whose_axes_are_fixed_needs_no_profile():
    assert profile_options(derive_profile([tensor("x", 1, 3)], {}, {})) == {}


def test_initializers_that_a_request_may_override_are_left_out():
    assert derive_profile([tensor("x", -1, is_optional=True)], {}, {}) == {}


def test_axis_without_bounds_is_refused_with_the_options_to_set():
    with pytest.raises(ValueError) as caught:
        derive_profile([tensor("ids", -1, -1)], {"ids": (ROWS, None)}, {})
    assert str(caught.value) == (
        "axis 1 of input 'ids' has no bounds, for which an engine could be built: give its smallest, usual and largest "
        "shape in trt_profile_min_shapes, trt_profile_opt_shapes, trt_profile_max_shapes, as in 'ids:NxN'"
    )


def test_input_that_nothing_is_known_of_is_refused():
    with pytest.raises(ValueError, match="axis 0 of input 'x' has no bounds"):
        derive_profile([tensor("x", -1)], {}, {})


def test_operators_shapes_fill_in_what_is_not_known():
    own = read_profile(options("ids:1x1", "ids:4x128", "ids:8x512"))
    inputs = [tensor("ids", -1, -1), tensor("mask", -1, 5)]
    profile = derive_profile(inputs, {"ids": (ROWS, None), "mask": (ROWS, None)}, own)
    assert profile == {"ids": (ROWS, Bounds(1, 128, 512)), "mask": (ROWS, fixed(5))}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (("x:2x4", "x:4x4", "x:8x4"), "trt_profile_min_shapes: axis 0 of 'x' is 2 to 8; the model takes 1 to 8"),
        (("x:1x4", "x:4x4", "x:4x4"), "trt_profile_max_shapes: axis 0 of 'x' is 1 to 4; the model takes 1 to 8"),
        (("x:1x1", "x:4x4", "x:8x8"), "trt_profile_max_shapes: axis 1 of 'x' is always 4"),
        (("x:1", "x:4", "x:8"), "trt_profile_min_shapes: 'x' has 2 axes, not 1"),
    ],
)
def test_operators_shapes_that_do_not_cover_the_model_are_refused(shapes, message):
    with pytest.raises(ValueError) as caught:
        derive_profile([tensor("x", -1, 4)], {"x": (ROWS, None)}, read_profile(options(*shapes)))
    assert str(caught.value) == message


def test_known_shape_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="input 'x' of the graph has 2 axes, not 1"):
        derive_profile([tensor("x", -1, -1)], {"x": (ROWS,)}, {})


def test_name_that_the_options_cannot_carry_is_refused():
    with pytest.raises(ValueError, match=r"input 'x:0' has ':' or ',' in its name"):
        derive_profile([tensor("x:0", -1)], {"x:0": (ROWS,)}, {})


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"trt_profile_min_shapes": "x:1"}, "trt_profile_opt_shapes is missing; "),
        (
            options("x:1", "x:1", "y:1"),
            "trt_profile_max_shapes: names other inputs than trt_profile_min_shapes: see 'x'",
        ),
        (options("x:1", "x:1x1", "x:1"), "trt_profile_max_shapes: the three shapes of 'x' have different numbers"),
        (options("x:2", "x:1", "x:2"), "trt_profile_max_shapes: axis 0 of 'x' has 2, 1 and 2; they ascend from 1"),
        (options("x:0", "x:1", "x:2"), "trt_profile_max_shapes: axis 0 of 'x' has 0, 1 and 2; they ascend from 1"),
        (options("x", "x:1", "x:2"), "trt_profile_min_shapes: 'x' is no shape, such as 'x:1x3x224x224'"),
        (options("x:1x", "x:1", "x:2"), "trt_profile_min_shapes: 'x:1x' is no shape"),
        (options("x:1,x:2", "x:1", "x:2"), "trt_profile_min_shapes: names 'x' twice; one profile is offered"),
    ],
)
def test_wrong_shapes_are_refused_by_option(given_options, message):
    with pytest.raises(ValueError) as caught:
        read_profile(given_options)
    assert str(caught.value).startswith(message)


def test_no_shapes_are_no_profile():
    assert read_profile({"trt_fp16_enable": "1"}) == {}


def test_usual_size_lies_within_the_bounds():
    assert between(2, 1, 8) == Bounds(2, 2, 8)
    assert between(2, 9, 8) == Bounds(2, 8, 8)


SIZES = st.integers(1, 1 << 20)
BOUNDS = st.lists(SIZES, min_size=3, max_size=3).map(lambda sizes: Bounds(*sorted(sizes)))
TENSORS = st.dictionaries(
    st.text("abc_/.", min_size=1, max_size=5),
    st.lists(st.tuples(st.one_of(st.just(-1), SIZES), BOUNDS), min_size=1, max_size=4),
    max_size=5,
)


@given(TENSORS)
def test_every_open_axis_is_covered_and_options_read_back_as_they_were_written(tensors):
    inputs = [tensor(name, *(dim for dim, _ in axes)) for name, axes in tensors.items()]
    profile = derive_profile(inputs, {name: [each for _, each in axes] for name, axes in tensors.items()}, {})
    assert set(profile) == {each.name for each in inputs if -1 in each.dims}
    for each in inputs:
        for dim, bounds in zip(each.dims, profile.get(each.name, ()), strict=-1 in each.dims):
            assert 1 <= bounds.min <= bounds.opt <= bounds.max
            assert dim == -1 or bounds == fixed(dim)
    assert read_profile(profile_options(profile)) == profile
