import ml_dtypes
import numpy as np
import onnx
import pytest

from sardonyx.errors import ConfigError
from sardonyx.runtime.dtypes import DATATYPES, KV_DATATYPES, from_ort_name


@pytest.mark.parametrize("name", [name for name in DATATYPES if name not in {"BF16", "BYTES"}])
def test_datatype_has_the_element_type_that_onnx_gives_its_array_type(name):
    assert DATATYPES[name].element_type == onnx.helper.np_dtype_to_tensor_dtype(DATATYPES[name].array)


def test_bf16_and_bytes_have_their_onnx_element_types():
    assert DATATYPES["BF16"].element_type == onnx.TensorProto.BFLOAT16
    assert DATATYPES["BF16"].array == np.uint16
    assert DATATYPES["BYTES"].element_type == onnx.TensorProto.STRING


def test_datatype_is_found_by_the_name_that_onnx_runtime_uses():
    assert from_ort_name("tensor(float)").name == "FP32"
    assert from_ort_name("tensor(string)").name == "BYTES"


def test_type_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"seq\(tensor\(float\)\) cannot be served"):
        from_ort_name("seq(tensor(float))")


def test_fp8_is_a_cache_s_and_no_datatype_of_the_protocol():
    fp8 = from_ort_name("tensor(float8e4m3fn)")
    assert fp8 is KV_DATATYPES["FP8"]
    assert fp8.element_type == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(ml_dtypes.float8_e4m3fn))
    assert fp8.array.itemsize == 1
    assert "FP8" not in DATATYPES
