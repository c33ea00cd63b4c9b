import os
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sardonyx.errors import ConfigError
from sardonyx.runtime.engine_cache import EngineKey, hash_graph, prepare_engine

KEY = EngineKey(
    graph="0123456789abcdef0123",
    options={"trt_fp16_enable": "1", "trt_profile_max_shapes": "x:8"},
    tensorrt=(10, 13, 2),
    onnx_runtime="1.31.1",
    compute_capability=90,
)


ENGINE = "sd_xl_unet_123_0_fp16_sm90.engine"


def key_with(**options: str) -> EngineKey:
    return msgspec.structs.replace(KEY, options=dict(KEY.options) | options)


def prepare(root, key=KEY):
    return prepare_engine(root, "sd/xl", "unet", root / "unet.onnx", key)


def names(folder: str | Path) -> list[str]:
    return [each.name for each in Path(folder).iterdir()]


def build(files) -> None:
    """What a session leaves behind that builds an engine."""
    place = Path(files.options["trt_engine_cache_path"])
    if context := files.options.get("trt_ep_context_file_path"):
        place = Path(context).parent / place
        Path(context).write_bytes(b"context")
    (place / ENGINE).write_bytes(b"engine")


def test_folder_is_named_by_all_that_an_engine_depends_on():
    assert KEY.name.startswith("0123456789abcdef-ort1.31.1-trt10.13.2-sm90-")


@pytest.mark.parametrize(
    "change",
    [
        {"graph": "f" * 64},
        {"tensorrt": (10, 13, 3)},
        {"onnx_runtime": "1.32.0"},
        {"compute_capability": 89},
        {"options": {"trt_fp16_enable": "1", "trt_profile_max_shapes": "x:16"}},
        {"options": {"trt_profile_max_shapes": "x:8"}},
    ],
)
def test_another_graph_version_card_or_option_has_another_engine(change):
    assert msgspec.structs.replace(KEY, **change).name != KEY.name


def test_options_that_change_no_engine_share_one():
    other = key_with(device_id="1", trt_detailed_build_log="1", trt_engine_cache_prefix="x", trt_timing_cache_path="y")
    assert other.name == KEY.name


def test_first_load_builds_and_the_next_one_finds_it(tmp_path):
    first = prepare(tmp_path)
    assert not first.is_built
    build(first)
    first.keep()
    second = prepare(tmp_path)
    assert second.is_built
    assert second.options["trt_engine_cache_path"] == str(tmp_path / "sd_xl" / f"unet-{KEY.name}")
    assert names(second.options["trt_engine_cache_path"]) == [ENGINE]


def test_session_gets_places_for_engine_and_timings(tmp_path):
    options = prepare(tmp_path).options
    assert options.pop("trt_engine_cache_path").startswith(str(tmp_path / "sd_xl" / f"unet-{KEY.name}.partial-"))
    assert options == dict(KEY.options) | {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_prefix": "sd_xl_unet",
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(tmp_path / "timing-trt10.13.2"),
    }
    assert (tmp_path / "timing-trt10.13.2").is_dir()


def test_operators_prefix_and_refusal_of_a_timing_cache_hold(tmp_path):
    options = prepare(tmp_path, key_with(trt_engine_cache_prefix="own", trt_timing_cache_enable="0")).options
    assert options["trt_engine_cache_prefix"] == "own"
    assert "trt_timing_cache_path" not in options


def test_operators_place_of_timings_is_made(tmp_path):
    own = tmp_path / "a" / "timings"
    assert prepare(tmp_path, key_with(trt_timing_cache_path=str(own))).options["trt_timing_cache_path"] == str(own)
    assert own.is_dir()


def test_build_that_failed_leaves_nothing(tmp_path):
    files = prepare(tmp_path)
    build(files)
    files.discard()
    assert names(tmp_path / "sd_xl") == []
    assert not prepare(tmp_path).is_built


def test_process_that_died_while_it_built_leaves_no_engine_and_its_folder_goes_later(tmp_path):
    build(prepare(tmp_path))
    assert not prepare(tmp_path).is_built
    long_ago = time.time() - 100_000
    abandoned = list((tmp_path / "sd_xl").iterdir())
    for folder in abandoned:
        os.utime(folder, (long_ago, long_ago))
    prepare(tmp_path).discard()
    assert list((tmp_path / "sd_xl").iterdir()) == []


def test_of_two_processes_that_build_at_once_the_first_ones_engine_stays(tmp_path):
    first, second = prepare(tmp_path), prepare(tmp_path)
    build(first)
    build(second)
    first.keep()
    second.keep()
    assert [each.name for each in (tmp_path / "sd_xl").iterdir()] == [f"unet-{KEY.name}"]
    assert prepare(tmp_path).is_built


def test_dumped_model_lies_beside_its_engine_and_is_opened_next_time(tmp_path):
    key = key_with(trt_dump_ep_context_model="1")
    first = prepare(tmp_path, key)
    assert first.path == tmp_path / "unet.onnx"
    assert first.options["trt_engine_cache_path"] == ""
    assert first.options["trt_ep_context_file_path"].endswith("/unet_ctx.onnx")
    assert first.options["trt_dump_ep_context_model"] == "1"
    build(first)
    first.keep()
    second = prepare(tmp_path, key)
    folder = tmp_path / "sd_xl" / f"unet-{key.name}"
    assert (second.is_built, second.path) == (True, folder / "unet_ctx.onnx")
    assert second.options["trt_engine_cache_path"] == str(folder)
    assert not {"trt_dump_ep_context_model", "trt_ep_context_file_path"} & second.options.keys()


def test_engine_without_the_dumped_model_is_used_as_one_from_the_cache(tmp_path):
    """The provider dumps no model of a graph that it takes in several parts."""
    first = prepare(tmp_path)
    build(first)
    first.keep()
    second = prepare(tmp_path, key_with(trt_dump_ep_context_model="1"))
    assert (second.is_built, second.path) == (True, tmp_path / "unet.onnx")
    assert "trt_dump_ep_context_model" not in second.options


def test_operators_name_of_the_dumped_model_is_kept(tmp_path):
    key = key_with(trt_dump_ep_context_model="1", trt_ep_context_file_path="a/own.onnx")
    assert prepare(tmp_path, key).options["trt_ep_context_file_path"].endswith("/own.onnx")


def test_cache_that_cannot_be_written_is_refused_by_setting(tmp_path):
    root = tmp_path / "file"
    root.touch()
    with pytest.raises(ConfigError, match=r"^engine_cache: .*file cannot be written"):
        prepare(root)


def write_graph(folder, weights):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1000])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1000])],
        [numpy_helper.from_array(np.full(1000, weights, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_weights_beside_a_graph_are_part_of_its_hash(tmp_path):
    one, two = write_graph(tmp_path / "a", 1.0), write_graph(tmp_path / "b", 2.0)
    assert one.read_bytes() == two.read_bytes()
    assert hash_graph(one) != hash_graph(two)
    assert hash_graph(one) == hash_graph(write_graph(tmp_path / "c", 1.0))
