import json
from pathlib import Path

import msgspec
import pytest
from tests.export.checkpoints import write_llama_folder
from tests.export.published import publish

from sardonyx.errors import ConfigError
from sardonyx.repository.layout import Repository
from sardonyx_export.request import ExportRequest, ExportResult, find_existing, has_usable_version


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository that holds ``tiny``, int8, of a folder called ``tiny``."""
    root = tmp_path / "repository"
    root.mkdir()
    publish(root, write_llama_folder(tmp_path / "tiny"), b"graph")
    return root


def _find(root: Path, source: str = "tiny", **changes: object) -> ExportResult | None:
    request = ExportRequest(source=str(root.parent / source), repository=root)
    return find_existing(msgspec.structs.replace(request, **changes))


def test_a_model_of_the_same_source_is_found_by_name_and_without(root: Path) -> None:
    for result in (
        _find(root),
        _find(root, name="tiny"),
        _find(root, precision="int8"),
        _find(root, max_model_len=256),
    ):
        assert result is not None
        assert (result.name, result.version, result.path) == ("tiny", 1, root / "tiny" / "1")


def test_another_source_name_precision_or_length_is_not_found(root: Path) -> None:
    assert _find(root, "other") is None
    assert _find(root, name="other") is None
    assert _find(root, precision="fp32") is None
    assert _find(root, max_model_len=128) is None
    assert _find(root, sha256="0" * 64) is None


def test_nothing_is_found_where_there_is_no_repository(tmp_path: Path) -> None:
    assert find_existing(ExportRequest(source="tiny", repository=tmp_path / "none")) is None


def test_a_version_with_a_file_cut_short_is_not_found_and_may_be_mended(root: Path) -> None:
    (root / "tiny" / "1" / "model.onnx.data").write_bytes(b"")
    assert _find(root) is None
    assert not has_usable_version(Repository(root), "tiny")


def test_a_version_with_a_broken_manifest_is_not_found_and_may_be_mended(root: Path) -> None:
    (root / "tiny" / "1" / "manifest.json").write_text("{")
    assert _find(root) is None


def test_somebodys_own_model_is_never_written_over(root: Path) -> None:
    (root / "tiny" / "1" / "manifest.json").unlink()
    assert has_usable_version(Repository(root), "tiny")
    (root / "tiny" / "config.pbtxt").write_text("nonsense")
    assert has_usable_version(Repository(root), "tiny")
    assert not has_usable_version(Repository(root), "other")


def test_a_source_that_is_none_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="hf:organisation/name"):
        find_existing(ExportRequest(source="hf:x", repository=root))


def test_manifests_of_wheels_are_known_by_their_hash(root: Path) -> None:
    path = root / "tiny" / "1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"] |= {"uri": "pypi:tiny==1", "sha256": "a" * 64}
    path.write_text(json.dumps(manifest))
    request = ExportRequest(source="pypi:tiny==1", repository=root, sha256="A" * 64)
    assert find_existing(request) is not None
