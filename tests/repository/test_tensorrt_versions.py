import pytest

from sardonyx.repository.accelerators import tensorrt_options
from sardonyx.repository.tensorrt_versions import MISSING, check_version


@pytest.mark.parametrize(
    ("parameters", "version", "message"),
    [
        (
            {"precision_mode": "FP16"},
            (11, 0, 0),
            "precision_mode FP16 is not part of TensorRT 11.0.0: export the graph",
        ),
        (
            {"precision_mode": "BF16"},
            (11, 4, 1),
            "precision_mode BF16 is not part of TensorRT 11.4.1: export the graph",
        ),
        ({"precision_mode": "INT8"}, (11, 0, 0), "precision_mode INT8 is not part of TensorRT 11.0.0: quantise"),
        ({"int8_calibration_table_name": "t"}, (11, 0, 0), "int8_calibration_table_name is not part of TensorRT 11"),
        ({"int8_use_native_calibration_table": "1"}, (11, 0, 0), "int8_use_native_calibration_table is not part"),
        ({"trt_layer_norm_fp32_fallback": "1"}, (11, 0, 0), "trt_layer_norm_fp32_fallback is not part of TensorRT 11"),
        ({"trt_tactic_sources": "-EDGE_MASK_CONVOLUTIONS,+CUDNN"}, (11, 0, 0), "trt_tactic_sources is not part"),
        ({"trt_dla_enable": "1"}, (10, 13, 2), "trt_dla_enable is not part of TensorRT 10.13.2: leave it out"),
        ({"trt_dla_enable": "1"}, (11, 4, 0), "trt_dla_enable is not part of TensorRT 11.4.0: leave it out"),
        ({}, (8, 6, 1), "TensorRT 8.6.1 is too old; versions from 10.0.0 on are used"),
    ],
)
def test_option_that_a_version_lacks_is_refused_by_parameter(parameters, version, message):
    with pytest.raises(ValueError) as caught:
        check_version(tensorrt_options(parameters), version)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("parameters", "version"),
    [
        ({"precision_mode": "FP16"}, (10, 16, 1)),
        ({"precision_mode": "FP32"}, (11, 0, 0)),
        ({"trt_dla_enable": "1", "trt_dla_core": "0"}, (10, 7, 0)),
        ({"trt_dla_enable": "1", "trt_dla_core": "1"}, (11, 4, 1)),
        ({"trt_dla_enable": "0", "trt_dla_core": "0"}, (11, 0, 0)),
        ({"trt_layer_norm_fp32_fallback": "0"}, (11, 0, 0)),
        ({"trt_tactic_sources": "-JIT_CONVOLUTIONS"}, (11, 0, 0)),
        ({"trt_tactic_sources": "-CUDNN"}, (10, 3, 0)),
        ({"max_workspace_size_bytes": "1", "trt_builder_optimization_level": "3"}, (11, 4, 1)),
    ],
)
def test_option_that_a_version_has_is_taken(parameters, version):
    check_version(tensorrt_options(parameters), version)


def test_every_missing_option_is_one_that_a_config_can_ask_for():
    asked = {
        **tensorrt_options({"precision_mode": "FP16"}),
        **tensorrt_options({"precision_mode": "BF16"}),
        **tensorrt_options({"precision_mode": "INT8", "int8_calibration_table_name": "t", "trt_dla_core": "0"}),
        **tensorrt_options({"int8_use_native_calibration_table": "1", "trt_layer_norm_fp32_fallback": "1"}),
        **tensorrt_options({"trt_tactic_sources": "x", "trt_dla_enable": "1"}),
    }
    assert {each.option for each in MISSING} == set(asked)
