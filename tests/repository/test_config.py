import json
import re
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from google.protobuf import json_format, text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelQueuePolicy

from sardonyx.errors import ConfigError
from sardonyx.repository.config import (
    MAX_BYTES,
    LanguageModelOptions,
    choose_versions,
    language_model_options,
    load_config,
    parse_config,
    parse_override,
)

GOOD = b"""
# an operator's comment
name: "tiny"
backend: "onnxruntime"
version_policy: { specific { versions: [ 1, 3 ] } }
parameters: { key: "max_num_seqs" value: { string_value: "8" } }
parameters { key: "kv_cache_bytes", value { string_value: "2GiB" } }
parameters [ { key: "max_step_ms" value { string_value: "50.5" } } ]
"""


def parameters(**values: str) -> bytes:
    config = ModelConfig()
    for key, value in values.items():
        config.parameters[key].string_value = value
    return text_format.MessageToString(config).encode()


def test_operators_file_is_understood():
    config = parse_config(GOOD, name="tiny")
    assert choose_versions(config, [1, 2, 3]) == [1, 3]
    assert language_model_options(config) == LanguageModelOptions(
        max_num_seqs=8, kv_cache_bytes=2 << 30, max_step_ms=50.5
    )


def test_missing_file_is_an_empty_config(tmp_path):
    config = load_config(tmp_path)
    assert config == ModelConfig(name=tmp_path.name)
    assert language_model_options(config) == LanguageModelOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name: "tiny"\nfoo: 3', 'c.pbtxt:2: foo: Message type "inference.ModelConfig" has no field named "foo".'),
        ("max_batch_size: x", "c.pbtxt:1: max_batch_size: Couldn't parse integer: x"),
        ("\n\nmax_batch_size: 99999999999", "c.pbtxt:3: max_batch_size: Value out of range"),
        ("instance_group [ { kind: KIND_FOO } ]", "c.pbtxt:1: kind: Enum type"),
        ('name: "a"\nname: "b"', "c.pbtxt:2: name:"),
        ("input [ {", "c.pbtxt:1: input: Expected"),
        ('name: "other"', "c.pbtxt: name: is 'other', but the folder is 'tiny'"),
        ('platform: "tensorrt_plan"', "c.pbtxt: platform: is 'tensorrt_plan'"),
        ('backend: "python"', "c.pbtxt: backend: is 'python'"),
        ('default_model_filename: "../x.onnx"', "c.pbtxt: default_model_filename: is not a plain file name"),
        ("version_policy { latest { } }", "c.pbtxt: version_policy.latest.num_versions: is 0"),
        ("version_policy { specific { } }", "c.pbtxt: version_policy.specific.versions: needs versions"),
        ("version_policy { specific { versions: 0 } }", "c.pbtxt: version_policy.specific.versions: needs versions"),
    ],
)
def test_wrong_config_is_refused_with_line_and_field(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text.encode(), name="tiny", file="c.pbtxt")
    assert str(caught.value).startswith(message)


def test_large_file_is_refused_before_it_is_parsed(tmp_path):
    (tmp_path / "config.pbtxt").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=r"is larger than 1,048,576 bytes"):
        load_config(tmp_path)


def test_folder_in_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "config.pbtxt").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [7]),
        ("version_policy { latest { num_versions: 2 } }", [3, 7]),
        ("version_policy { latest { num_versions: 9 } }", [1, 3, 7]),
        ("version_policy { all { } }", [1, 3, 7]),
        ("version_policy { specific { versions: [ 7, 2, 1, 1 ] } }", [1, 7]),
    ],
)
def test_version_policy_chooses_among_what_is_there(policy, expected):
    config = parse_config(policy.encode(), name="m")
    assert choose_versions(config, [7, 1, 3]) == expected
    assert choose_versions(config, []) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"max_seqs": "4"},
            "parameters['max_seqs']: is not a parameter of a language model; did you mean max_num_seqs?",
        ),
        ({"zzz": "4"}, "parameters['zzz']: is not a parameter of a language model; there are max_num_seqs,"),
        ({"max_num_seqs": "0"}, "parameters['max_num_seqs']: expected int >= 1, not '0'"),
        ({"max_num_seqs": "many"}, "parameters['max_num_seqs']: expected int, not 'many'"),
        ({"max_num_seqs": ""}, "parameters['max_num_seqs']: expected int, not ''"),
        ({"max_num_seqs": "null"}, "parameters['max_num_seqs']: expected int, not 'null'"),
        ({"max_step_ms": "nan"}, "parameters['max_step_ms']: expected float > 0.0, not 'nan'"),
        ({"max_step_ms": "inf"}, "parameters['max_step_ms']: expected float <= 60000.0, not 'inf'"),
        ({"kv_cache_bytes": "2GB"}, "parameters['kv_cache_bytes']: expected int, not '2GB'"),
    ],
)
def test_wrong_parameter_is_refused_by_name(values, message):
    config = parse_config(parameters(**values), name="m")
    with pytest.raises(ConfigError) as caught:
        language_model_options(config, file="c.pbtxt")
    assert str(caught.value).startswith(f"c.pbtxt: {message}")


@pytest.mark.parametrize(
    "text",
    [
        "max_batch_size: 8",
        "dynamic_batching { }",
        "sequence_batching { }",
        "instance_group [ { count: 2 } ]",
        'input [ { name: "x" data_type: TYPE_FP32 dims: 1 } ]',
        "optimization { priority: PRIORITY_MAX }",
        "response_cache { enable: true }",
        'default_model_filename: "other.onnx"',
    ],
)
def test_field_without_meaning_for_a_language_model_is_refused_by_name(text):
    config = parse_config(text.encode(), name="m")
    with pytest.raises(ConfigError, match="has no meaning for a language model") as caught:
        language_model_options(config)
    assert caught.value.field == text.partition(" ")[0].rstrip(":")


def parses_or_refuses(data: bytes) -> None:
    with suppress(ConfigError):
        config = parse_config(data, name="tiny")
        language_model_options(config)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_raise_config_error(data):
    parses_or_refuses(data)


@given(st.text(alphabet="abnmex_:{}[]<>,;#\"'\\0179.-\n /", max_size=80))
def test_any_text_like_a_config_parses_or_raises_config_error(text):
    parses_or_refuses(text.encode())


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")  # protobuf takes what C++ refuses
@settings(max_examples=300)
@given(st.integers(0, len(GOOD)), st.integers(0, len(GOOD)), st.binary(max_size=8))
def test_any_mutation_of_a_config_parses_or_raises_config_error(start, end, inserted):
    parses_or_refuses(GOOD[:start] + inserted + GOOD[end:])


@given(
    st.lists(st.sampled_from(["{", "[", "<", "input", "parameters", "ensemble_scheduling", ":", " step"]), max_size=60)
)
def test_any_nesting_parses_or_raises_config_error(pieces):
    parses_or_refuses("".join(pieces).encode())


def test_deep_nesting_is_refused():
    parses_or_refuses(b"input { " * 20_000)
    parses_or_refuses(b"foo { " * 20_000)
    parses_or_refuses(b"[" * 20_000)


CONFIGS = st.builds(
    ModelConfig,
    platform=st.sampled_from(["", "onnxruntime_onnx"]),
    backend=st.sampled_from(["", "onnxruntime"]),
    max_batch_size=st.integers(-(2**31), 2**31 - 1),
    cc_model_filenames=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    metric_tags=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)


@given(CONFIGS, st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3))
def test_config_survives_writing_and_reading(config, values):
    for key, value in values.items():
        config.parameters[key].string_value = value
    config.name = "tiny"
    assert parse_config(text_format.MessageToString(config).encode(), name="tiny") == config


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_num_seqs": st.integers(1, 4096),
            "max_model_len": st.integers(1, 1 << 24),
            "kv_cache_bytes": st.integers(1, 1 << 50),
            "max_step_ms": st.floats(0.001, 60_000),
        },
    )
)
def test_options_survive_writing_and_reading(values):
    config = parse_config(parameters(**{key: repr(value) for key, value in values.items()}), name="m")
    assert language_model_options(config) == LanguageModelOptions(**values)


def test_every_parameter_has_its_row_in_the_readme():
    text = (Path(__file__).parents[2] / "model_repository/README.md").read_text()
    names = [field.name for field in msgspec.structs.fields(LanguageModelOptions)]
    assert re.findall(r"^\| `(\w+)` \|", text.partition("Parameters of")[2].partition("##")[0], re.MULTILINE) == names


@pytest.mark.parametrize(
    "text",
    [
        '{"max_batch_size": "16", "backend": "onnxruntime"}',
        '{"maxBatchSize": 16, "backend": "onnxruntime", "name": "tiny"}',
    ],
)
def test_override_takes_numbers_as_strings_and_names_in_both_cases(text):
    expected = ModelConfig(name="tiny", max_batch_size=16, backend="onnxruntime")
    assert parse_override(text, name="tiny") == expected
    assert parse_override(text.encode(), name="tiny") == expected


def test_override_takes_enums_in_any_case():
    text = """
    {
        "input": [{"name": "x", "data_type": "type_fp32", "dims": ["-1", 4], "format": 0}],
        "instance_group": [{"kind": "Kind_CPU"}],
        "dynamic_batching": {"priority_queue_policy": {"1": {"timeout_action": "delay"}}},
        "version_policy": {"all": {}},
        "parameters": {"a": {"string_value": "type_fp32"}}
    }
    """
    config = parse_override(text, name="m")
    assert config.input[0] == ModelInput(name="x", data_type="TYPE_FP32", dims=[-1, 4])
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    assert config.dynamic_batching.priority_queue_policy[1].timeout_action == ModelQueuePolicy.DELAY
    assert config.parameters["a"].string_value == "type_fp32"
    assert choose_versions(config, [1, 2]) == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"foo": 1}', 'config: foo: Message type "inference.ModelConfig" has no field named "foo"'),
        ('{"input": [{"foo": 1}]}', 'config: input: Message type "inference.ModelInput" has no field named "foo"'),
        ('{"max_batch_size": "x"}', "config: max_batch_size: invalid literal for int() with base 10: 'x'"),
        ('{"max_batch_size": 99999999999}', "config: max_batch_size: Value out of range: 99999999999"),
        ('{"input": [{"data_type": "type_zz"}]}', "config: input.data_type: Invalid enum value TYPE_ZZ"),
        ('{"dynamic_batching": []}', "config: dynamic_batching: expected an object"),
        ('{"dynamic_batching": 1}', "config: dynamic_batching: expected an object"),
        ('{"input": {}}', "config: input: repeated field input must be in []"),
        ('{"parameters": {"a": 1}}', "config: value: expected an object"),
        ('{"dynamic_batching": {}, "sequence_batching": {}}', "config: scheduling_choice: Message type"),
        ("[]", "config: is not a JSON object"),
        ("", "config: is not JSON: Expecting value at character 0"),
        ('{"max_batch_size": 1,}', "config: is not JSON: "),
        ('{"max_batch_size": 1, "max_batch_size": 2}', "config: names a key twice in one object"),
        ('{"max_batch_size": NaN}', "config: NaN is not JSON"),
        ('{"a":' * 100_000, "config: is nested too deep"),
        (b'{"name": "\xff"}', "config: is not UTF-8"),
        (" " * (MAX_BYTES + 1), "config: is larger than 1,048,576 bytes"),
        ('{"name": "other"}', "config: name: is 'other', but the folder is 'm'"),
        ('{"platform": "tensorrt_plan"}', "config: platform: is 'tensorrt_plan'"),
        ('{"version_policy": {"latest": {}}}', "config: version_policy.latest.num_versions: is 0"),
    ],
)
def test_wrong_override_is_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_override(text, name="m")
    assert str(caught.value).startswith(message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "input", "dims", "kind", "instance_group", "parameters", "dynamic_batching"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(JSON.map(json.dumps) | st.text(max_size=40) | st.binary(max_size=40))
def test_any_override_parses_or_raises_config_error(text):
    with suppress(ConfigError):
        parse_override(text, name="m")


@given(CONFIGS)
def test_override_says_what_the_file_says(config):
    config.name = "tiny"
    text = json_format.MessageToJson(config)
    assert parse_override(text, name="tiny") == config


def test_ensemble_needs_no_backend():
    assert parse_config(b'platform: "ensemble"', name="m").platform == "ensemble"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'platform: "ensemble" backend: "onnxruntime"',
            "c.pbtxt: backend: Ensemble model 'm' must have platform type 'ensemble' and empty backend type",
        ),
        (
            'platform: "tensorrt_plan" backend: "onnxruntime"',
            "c.pbtxt: platform: unexpected 'platform' and 'backend' pair, got:tensorrt_plan, onnxruntime",
        ),
        (
            'platform: "onnxruntime_onnx" backend: "python"',
            "c.pbtxt: backend: unexpected 'platform' and 'backend' pair, got:onnxruntime_onnx, python",
        ),
        ('default_model_filename: ".."', "c.pbtxt: default_model_filename: is not a plain file name"),
        (r'default_model_filename: "a\\b"', "c.pbtxt: default_model_filename: is not a plain file name"),
    ],
)
def test_platform_and_file_that_no_family_has_are_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_config(text.encode(), name="m", file="c.pbtxt")
    assert str(caught.value) == message


def test_language_model_is_no_ensemble():
    with pytest.raises(ConfigError, match="platform: has no meaning for a language model"):
        language_model_options(parse_config(b'platform: "ensemble"', name="m"))
