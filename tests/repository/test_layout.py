import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.repository.conftest import fill_version

from sardonyx.errors import ConfigError, ModelNotFound
from sardonyx.repository.layout import Repository, check_files, file_problems, read_manifest, validate_model_name

BAD_NAMES = [
    "",
    ".",
    "..",
    ".staging",
    "../x",
    "a/b",
    "/etc",
    "a\\b",
    "-x",
    "_x",
    "a b",
    "a\0",
    "a\n",
    "ä",
    "x" * 129,
    "%2e",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_is_no_folder_is_refused(repository, name):
    with pytest.raises(ConfigError, match="is not a model name"):
        validate_model_name(name)
    with pytest.raises(ModelNotFound):
        repository.entry(name)
    with pytest.raises(ConfigError), repository.staging(name):
        pass


@pytest.mark.parametrize("name", ["a", "9", "smollm2-135m-instruct", "Qwen2.5_x", "x" * 128, "a..b"])
def test_plain_names_are_accepted(name):
    validate_model_name(name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30) | st.sampled_from(["../outside", "inside/../../outside", "a/../../outside", "..", "."]))
def test_no_name_leads_out_of_the_repository(tmp_path, name):
    for folder in ("repository/inside/1", "outside/1"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    try:
        entry = Repository(tmp_path / "repository").entry(name)
    except ModelNotFound:
        return
    assert entry.path.parent == tmp_path / "repository"


def test_published_model_is_found_with_its_config(repository, publish):
    folder = publish("tiny", 'name: "tiny"\nparameters { key: "max_num_seqs" value { string_value: "4" } }')
    entry = repository.entry("tiny")
    assert (entry.name, entry.versions, entry.version_path(1)) == ("tiny", [1], folder)
    assert entry.config.parameters["max_num_seqs"].string_value == "4"
    manifest = read_manifest(folder)
    assert manifest is not None
    check_files(folder, manifest, hashes=True)


def test_next_version_takes_the_next_number_and_the_operators_config_stays(repository, publish):
    publish("tiny", 'name: "tiny"')
    (repository.root / "tiny/config.pbtxt").write_text("version_policy { all { } }")
    assert publish("tiny", 'name: "tiny"').name == "2"
    entry = repository.entry("tiny")
    assert entry.versions == [1, 2]
    assert entry.config_path.read_text() == "version_policy { all { } }"


def test_model_without_config_gets_the_given_one(repository, publish):
    publish("tiny")
    assert not repository.entry("tiny").config_path.exists()
    publish("tiny", "version_policy { all { } }")
    assert repository.entry("tiny").versions == [1, 2]


def test_version_numbers_are_not_used_again(repository, publish):
    for _ in range(3):
        publish()
    shutil.rmtree(repository.root / "tiny/2")
    assert publish().name == "4"


def test_staged_folder_is_gone_when_nothing_is_published(repository):
    with repository.staging("tiny") as staged:
        fill_version(staged)
    assert not staged.exists()
    assert list((repository.root / ".staging").iterdir()) == []
    assert repository.entries() == []


def test_bad_config_is_refused_before_anything_moves(repository):
    with repository.staging("tiny") as staged:
        fill_version(staged)
        with pytest.raises(ConfigError, match="folder is 'tiny'"):
            repository.publish("tiny", staged, 'name: "other"')
    assert repository.entries() == []


def test_file_of_the_models_name_is_in_the_way(repository):
    with repository.staging("tiny") as staged:
        fill_version(staged)
        (repository.root / "tiny").write_text("")
        with pytest.raises(ConfigError, match="is in the way"):
            repository.publish("tiny", staged)


def test_published_folders_are_as_open_as_the_umask_says(repository, publish):
    umask = os.umask(0o022)
    try:
        folder = publish()
    finally:
        os.umask(umask)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert folder.parent.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", ["0", "01", "-1", "1.5", "+1", "x", "²", "１", "1 ", "9" * 19])
def test_folders_that_are_no_version_are_ignored(repository, publish, name):
    publish()
    (repository.root / "tiny" / name).mkdir()
    assert repository.entry("tiny").versions == [1]


def test_file_with_a_number_is_no_version(repository, publish):
    publish()
    (repository.root / "tiny/3").write_text("")
    assert repository.entry("tiny").versions == [1]


def test_folders_that_are_no_models_are_left_out(repository, publish):
    publish()
    (repository.root / "notes").mkdir()
    (repository.root / "README.md").write_text("")
    (repository.root / "lost+found").mkdir()
    assert [entry.name for entry in repository.entries()] == ["tiny"]


def test_one_broken_model_does_not_hide_its_neighbours(repository, publish):
    publish("good")
    publish("bad", 'name: "bad"')
    (repository.root / "bad/config.pbtxt").write_text("nonsense")
    (repository.root / "not a name/1").mkdir(parents=True)
    bad, good, unnamed = repository.entries()
    assert (good.versions, good.error) == ([1], None)
    assert bad.versions == []
    assert "config.pbtxt:1" in str(bad.error)
    assert "is not a model name" in str(unnamed.error)
    with pytest.raises(ConfigError):
        repository.entry("bad")


def test_missing_repository_is_refused(repository):
    with pytest.raises(ConfigError, match="no model repository: No such file"):
        repository.entries()


@pytest.mark.parametrize("link", ["tiny", "tiny/2", "tiny/config.pbtxt"])
def test_link_out_of_the_repository_is_refused(repository, publish, tmp_path, link):
    (tmp_path / "outside/1").mkdir(parents=True)
    if link != "tiny":
        publish()
    repository.root.mkdir(exist_ok=True)
    (repository.root / link).symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="leads out of the repository"):
        repository.entry("tiny")
    assert [entry.error is None for entry in repository.entries()] == [False]


def test_link_inside_the_repository_is_followed(repository, publish):
    publish()
    (repository.root / "alias").symlink_to(repository.root / "tiny")
    assert repository.entry("alias").versions == [1]


def test_links_that_go_round_are_refused(repository, publish):
    folder = publish()
    (repository.root / "tiny/config.pbtxt").symlink_to(repository.root / "tiny/config.pbtxt")
    with pytest.raises(ConfigError, match="cannot be read"):
        repository.entry("tiny")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(folder / "manifest.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_manifest(folder)


def test_folder_without_manifest_is_a_plain_model(repository, publish):
    folder = publish()
    (folder / "manifest.json").unlink()
    assert read_manifest(folder) is None


def test_manifest_behind_a_link_out_of_the_model_is_refused(publish, tmp_path):
    folder = publish()
    shutil.move(folder / "manifest.json", tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(ConfigError, match="leads out of the model's folder"):
        read_manifest(folder)


def remove(path: Path) -> None:
    path.unlink()


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def flip(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    shutil.move(path, path.parents[3] / path.name)
    path.symlink_to(path.parents[3] / path.name)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "is missing although the manifest lists it"),
        (grow, "the manifest says"),
        (flip, "does not have the sha256"),
        (replace_by_folder, "is not a file"),
        (replace_by_link, "leads out of the model's folder"),
    ],
)
def test_damaged_file_is_named(publish, name, damage, message):
    folder = publish()
    manifest = read_manifest(folder)
    assert manifest is not None
    damage(folder / name)
    (problem,) = file_problems(folder, manifest, hashes=True)
    assert problem.file == str(folder / name)
    assert message in problem.reason
    with pytest.raises(ConfigError):
        check_files(folder, manifest, hashes=True)


def test_sizes_alone_are_compared_without_hashes(publish):
    folder = publish()
    manifest = read_manifest(folder)
    assert manifest is not None
    flip(folder / "model.onnx")
    assert list(file_problems(folder, manifest, hashes=False)) == []
