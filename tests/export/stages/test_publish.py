"""Writing a version: what the manifest says of it, and what a kill at any moment leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.export.checkpoints import write_llama_folder
from tests.export.published import PARITY, publish

from sardonyx.repository.layout import Repository, check_files, read_manifest


def test_the_manifest_vouches_for_every_file_and_says_where_they_came_from(tmp_path: Path) -> None:
    source = write_llama_folder(tmp_path / "source")
    root = tmp_path / "repository"
    root.mkdir()
    assert publish(root, source, b"graph") == 1
    version = root / "tiny" / "1"
    manifest = read_manifest(version)
    assert manifest is not None
    check_files(version, manifest, hashes=True)
    listed = {"manifest.json", *(file.path for file in manifest.files)}
    listed |= {file.path for graph in manifest.graphs.values() for file in [graph.model, *graph.data]}
    assert listed == {path.name for path in version.iterdir()}
    assert manifest.source.architecture == "LlamaForCausalLM"
    assert manifest.source.licence == "mit"
    assert manifest.source.weights == "F32 -> int8"
    assert manifest.precision == "int8"
    assert manifest.parity == [PARITY]
    assert {"sardonyx", "onnx", "onnxruntime", "gguf", "numpy"} <= set(manifest.tools)
    assert manifest.created.endswith("Z")


def test_a_new_model_gets_a_config_and_an_edited_one_is_kept(tmp_path: Path) -> None:
    source = write_llama_folder(tmp_path / "source")
    root = tmp_path / "repository"
    root.mkdir()
    publish(root, source, b"one")
    config = root / "tiny" / "config.pbtxt"
    assert Repository(root).entry("tiny").error is None
    edited = config.read_text() + 'parameters { key: "max_num_seqs" value { string_value: "4" } }\n'
    config.write_text(edited)
    assert publish(root, source, b"two") == 2
    assert config.read_text() == edited
    assert Repository(root).entry("tiny").versions == [2]


_DRIVER = """
import io, json, os, sys
from pathlib import Path
from tests.export.published import publish
from sardonyx.repository.layout import Repository, check_files, read_manifest

root, source, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
has_old = (root / "tiny").exists()

def state():
    "What a server would find: the models and their versions, each complete."
    found = {}
    for entry in Repository(root).entries():
        assert entry.error is None, entry.error
        versions = sorted(int(path.name) for path in entry.path.iterdir() if path.name.isdigit())
        for version in versions:
            manifest = read_manifest(entry.version_path(version))
            check_files(entry.version_path(version), manifest, hashes=True)
        assert entry.config_path.exists()
        found[entry.name] = versions
    return found

class Steps:
    "Counts what reaches the disk and dies at the k-th, a write half done."
    def __init__(self, k):
        self.left = k
    def step(self, before_death=lambda: None):
        self.left -= 1
        if self.left == 0:
            before_death()
            os._exit(137)

def arm(k):
    steps = Steps(k)
    real_open, real_fsync = io.open, os.fsync
    class Dying(io.FileIO):
        def write(self, data):
            steps.step(lambda: super(Dying, self).write(bytes(data)[: len(data) // 2]))
            return super().write(data)
    def dying_open(file, mode="r", *args, **kwargs):
        if not set(mode) & set("wxa+"):
            return real_open(file, mode, *args, **kwargs)
        raw = Dying(file, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")
    io.open = dying_open
    def fsync(descriptor):
        steps.step()
        real_fsync(descriptor)
    os.fsync = fsync
    def hook(event, arguments):
        if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.symlink", "os.truncate"):
            steps.step()
    sys.addaudithook(hook)

before = state()
outcomes = []
for k in range(1, limit):
    child = os.fork()
    if child == 0:
        arm(k)
        publish(root, source, b"new")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 137), code
    after = state()
    outcomes.append((code, after == before))
    if code == 0:
        break
    if after != before:  # killed after the rename: put the old state back for the next moment
        import shutil
        shutil.rmtree(root / "tiny" / str(max(after["tiny"]))) if has_old else shutil.rmtree(root / "tiny")
        assert state() == before
publish(root, source, b"newer")
leftovers = list((root / ".staging").iterdir())
print(json.dumps({"outcomes": outcomes, "leftovers": len(leftovers), "end": state()}))
"""


@pytest.mark.parametrize("has_old", [False, True])
def test_a_kill_at_any_write_flush_or_rename_leaves_the_old_state_or_the_new(tmp_path: Path, has_old: bool) -> None:
    source = write_llama_folder(tmp_path / "source")
    root = tmp_path / "repository"
    root.mkdir()
    if has_old:
        publish(root, source, b"old")
    command = [sys.executable, "-c", _DRIVER, str(root), str(source), "200"]
    result = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    outcomes = [tuple(outcome) for outcome in report["outcomes"]]
    assert outcomes[-1][0] == 0  # every step was tried, up to a run that nobody killed
    assert len(outcomes) > 20
    is_old = [was_old for _, was_old in outcomes]
    assert is_old == sorted(is_old, reverse=True)  # first the old state, then the new one, and never back
    assert not is_old[-1]
    assert report["leftovers"] == 0  # what the killed ones left was cleared away
    assert report["end"]["tiny"][-1] == max(report["end"]["tiny"])
