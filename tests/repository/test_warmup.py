import pytest
from tests.repository.configs import OUTPUT, TENSORS, read, refusal
from tritonclient.grpc.model_config_pb2 import DataType

from sardonyx.repository.warmup import WarmupInput, WarmupSample

FP32 = DataType.Value("TYPE_FP32")


def value(key: str = "x", data_type: str = "TYPE_FP32", dims: str = "4", data: str = "zero_data: true") -> str:
    return f'inputs {{ key: "{key}" value {{ data_type: {data_type} dims: [ {dims} ] {data} }} }} '


def warmup(text: str, tensors: str = TENSORS, max_batch_size: int = 8) -> str:
    return tensors + f"max_batch_size: {max_batch_size} model_warmup {{ {text} }} "


def test_samples_are_read_in_order():
    text = warmup('name: "first" batch_size: 8 count: 3 ' + value(data="random_data: true"))
    text += 'model_warmup { name: "second" batch_size: 1 ' + value(data='input_data_file: "raw"') + "}"
    assert read(text).warmup == [
        WarmupSample(
            name="first",
            batch_size=8,
            count=3,
            inputs=[WarmupInput(name="x", data_type=FP32, dims=(4,), source="random")],
        ),
        WarmupSample(
            name="second",
            inputs=[WarmupInput(name="x", data_type=FP32, dims=(4,), source="file", file_name="raw")],
        ),
    ]


def test_zeros_are_chosen_by_the_field_alone():
    assert read(warmup("batch_size: 1 " + value(data="zero_data: false"))).warmup[0].inputs[0].source == "zero"


def test_optional_input_may_be_left_out():
    tensors = 'input { name: "z" data_type: TYPE_FP32 dims: 1 optional: true } ' + TENSORS
    assert [each.name for each in read(warmup("batch_size: 1 " + value(), tensors)).warmup[0].inputs] == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (value(), "batch_size: is 0; it must be from 1 to 8"),
        ("batch_size: 9 " + value(), "batch_size: is 9; it must be from 1 to 8"),
        ("batch_size: 1 count: 10001 " + value(), "count: is above 10,000"),
        ("batch_size: 1", "inputs: leaves out x"),
        ("batch_size: 1 " + value() + value("q"), "inputs['q']: is no input of the model"),
        ("batch_size: 1 " + value(data_type="TYPE_INT8"), "inputs['x'].data_type: is not the input's own"),
        ("batch_size: 1 " + value(dims="5"), "inputs['x'].dims: is [5]; it must be the input's dims [4]"),
        ("batch_size: 1 " + value(dims="4, 1"), "inputs['x'].dims: is [4, 1]; it must be the input's dims [4]"),
        ("batch_size: 1 " + value(data=""), "inputs['x']: needs zero_data, random_data or input_data_file"),
        (
            "batch_size: 1 " + value(data='input_data_file: "../raw"'),
            "inputs['x'].input_data_file: is not a plain file name",
        ),
    ],
)
def test_wrong_sample_is_refused_by_field(text, message):
    assert refusal(warmup(text)).startswith(f"c.pbtxt: model_warmup[0].{message}")


def test_sample_of_a_model_without_batches_has_one_row():
    assert refusal(warmup("batch_size: 2 " + value(), max_batch_size=0)).startswith(
        "c.pbtxt: model_warmup[0].batch_size: is 2; it must be from 1 to 1"
    )


def test_variable_sizes_must_be_fixed_and_bounded():
    tensors = 'input { name: "x" data_type: TYPE_FP32 dims: [ -1, 2 ] } ' + OUTPUT
    assert read(warmup("batch_size: 1 " + value(dims="3, 2"), tensors)).warmup[0].inputs[0].dims == (3, 2)
    field = "c.pbtxt: model_warmup[0].inputs['x'].dims: "
    assert refusal(warmup("batch_size: 1 " + value(dims="-1, 2"), tensors)).startswith(f"{field}is [-1, 2]")
    assert refusal(warmup("batch_size: 2 " + value(dims="268435457, 2"), tensors)).startswith(
        f"{field}makes more than 1,073,741,824 elements"
    )
