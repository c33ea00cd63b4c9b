import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.repository.conftest import listed

from sardonyx.errors import ConfigError
from sardonyx.repository.check import check_repository
from sardonyx.repository.layout import Repository


def messages(root: Path) -> list[str]:
    return [str(finding).replace(f"{root}/", "") for finding in check_repository(root)]


def test_good_repository_has_no_findings(repository, publish):
    publish("one")
    publish("two", 'backend: "onnxruntime"\nparameters { key: "max_num_seqs" value { string_value: "4" } }')
    assert check_repository(repository.root) == []


@pytest.mark.parametrize(("target", "num_findings"), [("cpu", 1), ("cuda", 0)])
def test_a_language_model_for_cards_may_name_its_card(repository, publish, target, num_findings):
    folder = publish("one", "instance_group { kind: KIND_GPU gpus: 1 }")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"target": target}))
    findings = messages(repository.root)
    assert len(findings) == num_findings
    assert all("instance_group" in finding for finding in findings)


def test_missing_repository_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no model repository"):
        check_repository(tmp_path / "nowhere")


def rewrite_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder.parent / "config.pbtxt").write_text(text) and None


def rewrite_tokenizer(text: str) -> Callable[[Path], None]:
    """Another tokenizer.json that the manifest vouches for."""

    def rewrite(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = listed(folder / "tokenizer.json")
        manifest["files"] = [{"path": entry.path, "sha256": entry.sha256, "size_bytes": entry.size_bytes}]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return rewrite


def list_no_tokenizer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": []}))


def remove_version(folder: Path) -> None:
    folder.rename(folder.parent / "01")


def remove_all_but_tokenizer(folder: Path) -> None:
    for name in ("manifest.json", "model.onnx", "model.onnx.data"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (rewrite_config("nonsense"), ["m: m/config.pbtxt:1: "]),
        (rewrite_config('name: "x"'), ["m: m/config.pbtxt: name: is 'x'"]),
        (rewrite_config("max_batch_size: 8"), ["m: m/config.pbtxt: max_batch_size: has no meaning"]),
        (
            rewrite_config('parameters { key: "max_model_len" value { string_value: "129" } }'),
            ["m: m/config.pbtxt: parameters['max_model_len']: is 129; the graph was built for 128"],
        ),
        (
            rewrite_config("version_policy { specific { versions: [ 1, 5 ] } }"),
            ["m: m/config.pbtxt: version_policy.specific.versions: names version 5, which is not there"],
        ),
        (rewrite_tokenizer("{"), ["m: m/1/tokenizer.json: "]),
        (rewrite_tokenizer("[]"), ["m: m/1/tokenizer.json: Expected `object`"]),
        (list_no_tokenizer, ["m: m/1/manifest.json: files: lists no tokenizer.json"]),
        (lambda folder: (folder / "manifest.json").write_text("{"), ["m: m/1/manifest.json: "]),
        (lambda folder: (folder / "model.onnx").unlink(), ["m: m/1/model.onnx: is missing"]),
        (remove_version, ["m: m/01: is ignored", "m: m: has no version to serve"]),
        (remove_all_but_tokenizer, ["m: m/1: has neither manifest.json nor model.onnx"]),
    ],
)
def test_damage_is_found_with_file_and_field(repository, publish, damage, expected):
    folder = publish("m", 'name: "m"')
    damage(folder)
    found = messages(repository.root)
    assert len(found) == len(expected)
    for finding, start in zip(found, expected, strict=True):
        assert finding.startswith(start)


def test_one_run_names_all_findings_of_all_models(repository, publish):
    (publish("a") / "model.onnx").unlink()
    (publish("b") / "tokenizer.json").write_text("{}")
    (publish("b") / "model.onnx.data").write_bytes(b"")
    rewrite_config("version_policy { all { } }")(repository.root / "b/1")
    (repository.root / "bad name/1").mkdir(parents=True)
    assert [finding.split(":")[:2] for finding in messages(repository.root)] == [
        ["a", " a/1/model.onnx"],
        ["b", " b/1/tokenizer.json"],
        ["b", " b/2/model.onnx.data"],
        ["bad name", " name"],
    ]


def test_hashes_can_be_left_out(repository, publish):
    (publish("m") / "model.onnx").write_bytes(b"GRAPH")
    assert len(check_repository(repository.root)) == 1
    assert check_repository(repository.root, hashes=False) == []


def test_plain_model_needs_only_its_graph(tmp_path):
    (tmp_path / "repository/plain/1").mkdir(parents=True)
    (tmp_path / "repository/plain/1/model.onnx").write_bytes(b"")
    assert check_repository(Repository(tmp_path / "repository").root) == []


ENSEMBLE = """
platform: "ensemble"
input { name: "x" data_type: TYPE_FP32 dims: 4 }
output { name: "y" data_type: TYPE_FP32 dims: 4 }
ensemble_scheduling { step { model_name: "a" input_map { key: "i" value: "x" } output_map { key: "o" value: "NAME" } } }
"""


@pytest.mark.parametrize(
    ("config", "has_graph", "expected"),
    [
        ("", True, []),
        ("instance_group { passive: true }", True, ["m: m/config.pbtxt: instance_group[0].passive: is not offered: "]),
        (ENSEMBLE.replace("NAME", "y"), False, []),
        (ENSEMBLE.replace("NAME", "z"), False, ["m: m/config.pbtxt: output: ensemble output 'y' for ensemble m' is"]),
    ],
)
def test_config_of_a_tensor_model_or_an_ensemble_is_checked(repository, config, has_graph, expected):
    version = repository.root / "m" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text(config)
    if has_graph:
        (version / "model.onnx").write_bytes(b"graph")
    found = messages(repository.root)
    assert len(found) == len(expected)
    assert all(message.startswith(start) for message, start in zip(found, expected, strict=True))
