"""What operators decide about models with a manifest, by family: parameters, and few fields beside them."""

import re
from pathlib import Path

import msgspec
import pytest
from tests.repository.configs import with_parameters

from sardonyx.errors import ConfigError
from sardonyx.repository.config import parse_config
from sardonyx.repository.diffusion_config import DiffusionModelOptions, diffusion_model_options
from sardonyx.repository.encoder_config import EncoderOptions, encoder_options
from sardonyx.repository.speech_config import SpeechModelOptions, speech_model_options

README = (Path(__file__).parents[2] / "model_repository/README.md").read_text()
READERS = {
    "a speech model": speech_model_options,
    "a diffusion model": diffusion_model_options,
    "an encoder model": encoder_options,
}
EMPTY = [SpeechModelOptions(), DiffusionModelOptions(), EncoderOptions()]


def section(title):
    return README.partition(f"### {title}")[2].partition("\n##")[0]


@pytest.mark.parametrize(
    ("read", "parameters", "options"),
    [
        (
            speech_model_options,
            {"max_num_seqs": "8", "max_batch_windows": " 2 ", "kv_cache_bytes": "512MiB"},
            SpeechModelOptions(max_num_seqs=8, max_batch_windows=2, kv_cache_bytes=512 << 20),
        ),
        (
            diffusion_model_options,
            {"max_num_seqs": "8", "max_batch_rows": "4", "max_pixels": "1048576", "max_steps": "150", "moderator": "x"},
            DiffusionModelOptions(max_num_seqs=8, max_batch_rows=4, max_pixels=1 << 20, max_steps=150, moderator="x"),
        ),
    ],
)
def test_parameters_are_read(read, parameters, options):
    assert read(with_parameters(**parameters)) == options


@pytest.mark.parametrize(("read", "empty"), list(zip(READERS.values(), EMPTY, strict=True)), ids=READERS)
def test_parameters_that_are_left_out_are_the_servers_choice(read, empty):
    assert read(with_parameters()) == empty
    text = b'name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" version_policy { all { } }'
    assert read(parse_config(text, name="m")) == empty


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_num_seqs", "many", "expected int, not 'many'"),
        ("max_num_seqs", "0", "expected int >= 1, not '0'"),
        ("max_num_seqs", "4097", "expected int <= 4096, not '4097'"),
        ("max_batch_windows", "65", "expected int <= 64, not '65'"),
        ("max_batch_windows", "null", "expected int, not 'null'"),
        ("kv_cache_bytes", "2 fortnights", "expected int, not '2 fortnights'"),
        ("max_model_len", "448", "is not a parameter of a speech model; there are max_num_seqs,"),
        ("max_batch_window", "1", "is not a parameter of a speech model; did you mean max_batch_windows?"),
    ],
)
def test_wrong_parameter_of_a_speech_model_is_refused_by_name(key, value, message):
    with pytest.raises(ConfigError) as caught:
        speech_model_options(with_parameters(**{key: value}), file="f.pbtxt")
    assert str(caught.value).startswith(f"f.pbtxt: parameters['{key}']: {message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_num_seqs", "0", "expected int >= 1, not '0'"),
        ("max_batch_rows", "4097", "expected int <= 4096, not '4097'"),
        ("max_pixels", "63", "expected int >= 64, not '63'"),
        ("max_steps", "1001", "expected int <= 1000, not '1001'"),
        ("default_guidance", "-1", "expected float >= 0.0, not '-1'"),
        ("max_step", "10", "is not a parameter of a diffusion model; did you mean max_steps?"),
        ("kv_cache_bytes", "10", "is not a parameter of a diffusion model"),
    ],
)
def test_wrong_parameter_of_a_diffusion_model_is_refused_by_name(key, value, message):
    with pytest.raises(ConfigError) as caught:
        diffusion_model_options(with_parameters(**{key: value}), file="f.pbtxt")
    assert str(caught.value).startswith(f"f.pbtxt: parameters['{key}']: {message}")


@pytest.mark.parametrize("owner", READERS)
@pytest.mark.parametrize("text", ["dynamic_batching: { }", "instance_group: { count: 2 }", "input: { name: 'a' }"])
def test_field_without_meaning_is_refused_by_name(owner, text):
    with pytest.raises(ConfigError, match=f"{text.partition(':')[0]}: has no meaning for {owner}"):
        READERS[owner](parse_config(text.encode(), name="m"))


@pytest.mark.parametrize("owner", ["a speech model", "a diffusion model"])
def test_batch_size_has_a_meaning_for_encoder_models_alone(owner):
    config = parse_config(b"max_batch_size: 4", name="m")
    with pytest.raises(ConfigError, match=f"max_batch_size: has no meaning for {owner}"):
        READERS[owner](config)
    assert encoder_options(config) == EncoderOptions()


@pytest.mark.parametrize(
    ("title", "kind"), [("Speech models", SpeechModelOptions), ("Image models", DiffusionModelOptions)]
)
def test_every_parameter_has_its_row_in_the_readme(title, kind):
    names = [field.name for field in msgspec.structs.fields(kind)]
    assert re.findall(r"^\| `(\w+)` \|", section(title), re.MULTILINE) == names


@pytest.mark.parametrize(
    ("title", "read", "options"),
    [
        ("Speech models", speech_model_options, SpeechModelOptions(max_num_seqs=8, kv_cache_bytes=512 << 20)),
        ("Image models", diffusion_model_options, DiffusionModelOptions(max_batch_rows=4, moderator="open-nsfw")),
    ],
)
def test_example_in_the_readme_is_read(title, read, options):
    example = section(title).partition("```\n")[2].partition("```")[0]
    assert read(parse_config(example.encode(), name=re.search(r'name: "(.+?)"', example)[1])) == options
