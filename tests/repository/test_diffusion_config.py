import re
from pathlib import Path

import msgspec
import pytest
from tritonclient.grpc.model_config_pb2 import ModelConfig

from sardonyx.errors import ConfigError
from sardonyx.repository.config import parse_config
from sardonyx.repository.diffusion_config import DiffusionModelOptions, diffusion_model_options

README = (Path(__file__).parents[2] / "model_repository/README.md").read_text()
SECTION = README.partition("### Image models")[2].partition("\n##")[0]


def config(**parameters: str) -> ModelConfig:
    result = ModelConfig(name="m")
    for key, value in parameters.items():
        result.parameters[key].string_value = value
    return result


def test_parameters_are_read():
    given = config(max_num_seqs="8", max_batch_rows=" 4 ", max_pixels="1048576", max_steps="150", moderator="nsfw")
    assert diffusion_model_options(given) == DiffusionModelOptions(
        max_num_seqs=8, max_batch_rows=4, max_pixels=1 << 20, max_steps=150, moderator="nsfw"
    )


def test_parameters_that_are_left_out_are_the_servers_choice():
    assert diffusion_model_options(config()) == DiffusionModelOptions()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_num_seqs", "many", r"f.pbtxt: parameters\['max_num_seqs'\]: expected int, not 'many'"),
        ("max_num_seqs", "0", r"f.pbtxt: parameters\['max_num_seqs'\]: expected int >= 1, not '0'"),
        ("max_batch_rows", "4097", r"f.pbtxt: parameters\['max_batch_rows'\]: expected int <= 4096, not '4097'"),
        ("max_pixels", "63", r"f.pbtxt: parameters\['max_pixels'\]: expected int >= 64, not '63'"),
        ("max_steps", "1001", r"f.pbtxt: parameters\['max_steps'\]: expected int <= 1000, not '1001'"),
        ("max_step", "10", r"is not a parameter of a diffusion model; did you mean max_steps\?"),
        ("kv_cache_bytes", "10", r"is not a parameter of a diffusion model"),
    ],
)
def test_wrong_parameter_is_refused_by_name(key, value, message):
    with pytest.raises(ConfigError, match=message):
        diffusion_model_options(config(**{key: value}), file="f.pbtxt")


@pytest.mark.parametrize(
    "text", ["max_batch_size: 4", "dynamic_batching: { }", "instance_group: { count: 2 }", "input: { name: 'a' }"]
)
def test_field_without_meaning_is_refused_by_name(text):
    with pytest.raises(ConfigError, match=f"{text.partition(':')[0]}: has no meaning for a diffusion model"):
        diffusion_model_options(parse_config(text.encode(), name="m"))


def test_fields_with_meaning_are_taken():
    text = b'name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" version_policy { all { } }'
    assert diffusion_model_options(parse_config(text, name="m")) == DiffusionModelOptions()


def test_every_parameter_has_its_row_in_the_readme():
    names = [field.name for field in msgspec.structs.fields(DiffusionModelOptions)]
    assert re.findall(r"^\| `(\w+)` \|", SECTION, re.MULTILINE) == names


def test_example_in_the_readme_is_read():
    example = SECTION.partition("```\n")[2].partition("```")[0]
    options = diffusion_model_options(parse_config(example.encode(), name="stable-diffusion"))
    assert options == DiffusionModelOptions(max_batch_rows=4, moderator="open-nsfw")
