"""Model configs for tests, in text format."""

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.tensor_config import TensorConfig, read_tensor_config

HEAD = 'name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" '
INPUT = 'input { name: "x" data_type: TYPE_FP32 dims: [ 4 ] } '
OUTPUT = 'output { name: "y" data_type: TYPE_FP32 dims: [ 4 ] } '
TENSORS = INPUT + OUTPUT


def config_of(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig())


def with_parameters(**parameters: str) -> ModelConfig:
    """Nothing but a name and parameters."""
    result = ModelConfig(name="m")
    for key, value in parameters.items():
        result.parameters[key].string_value = value
    return result


def read(text: str, *, num_gpus: int = 0) -> TensorConfig:
    """Read a plain tensor model's config with its head in front."""
    return read_tensor_config(config_of(HEAD + text), file="c.pbtxt", num_gpus=num_gpus)


def refusal(text: str, *, num_gpus: int = 0, head: str = HEAD) -> str:
    """What `read` says instead."""
    with pytest.raises(ConfigError) as caught:
        read_tensor_config(config_of(head + text), file="c.pbtxt", num_gpus=num_gpus)
    return str(caught.value)
