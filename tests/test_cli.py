import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tiny_models import make_language_model
from tests.tiny_paged import make_paged_repository

from sardonyx import cli
from sardonyx.repository.layout import Repository
from sardonyx.settings import options
from sardonyx.version import __version__


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    for variable in ("SARDONYX_CONFIG", "SARDONYX_PORT", "SARDONYX_REPOSITORY"):
        monkeypatch.delenv(variable, raising=False)


def test_version_is_printed(capsys):
    assert run(["--version"], capsys)[:2] == (0, f"{__version__}\n")


def test_every_setting_but_the_secrets_has_a_flag(capsys):
    code, out, _ = run(["serve", "--help"], capsys)
    assert code == 0
    for option in options():
        assert option.flag is None or f"{option.flag} " in out
    assert "api-keys " not in out


def test_wrong_value_is_told_in_one_line_with_code_2(capsys):
    code, out, err = run(["serve", "--port", "x"], capsys)
    assert (code, out, err) == (2, "", "sardonyx: --port: expected int, not 'x'\n")


def test_wrong_file_is_told_in_one_line_with_code_2(tmp_path, capsys):
    (tmp_path / "s.toml").write_text("prot = 1")
    code, _, err = run(["serve", "--config", "s.toml"], capsys)
    assert (code, err) == (2, "sardonyx: s.toml: prot: is not a setting; did you mean port?\n")


def test_unknown_flag_and_command_end_with_code_2(capsys):
    assert run(["serve", "--prot", "1"], capsys)[0] == 2
    assert run(["bogus"], capsys)[0] == 2


def test_models_lists_what_is_there_and_what_is_wrong(tmp_path, capsys):
    repository = Repository(tmp_path / "repo")
    with repository.staging("plain") as staged:
        (staged / "model.onnx").write_bytes(b"x" * 1_500_000)
        repository.publish("plain", staged)
    (tmp_path / "repo/broken/1").mkdir(parents=True)
    (tmp_path / "repo/broken/config.pbtxt").write_text("nonsense")
    code, out, _ = run(["models", "repo"], capsys)
    header, broken, plain = out.splitlines()
    assert code == 0
    assert header.split() == ["MODEL", "VERSIONS", "FAMILY", "PRECISION", "SIZE", "STATE"]
    assert broken.startswith("broken  -")
    assert "unavailable: " in broken
    assert "config.pbtxt:1" in broken
    assert plain.split() == ["plain", "1", "tensors", "-", "1.5", "MB", "ok"]


def test_models_of_a_missing_repository_is_a_mistake(capsys):
    code, _, err = run(["models", "/nowhere"], capsys)
    assert (code, err) == (2, "sardonyx: /nowhere: no model repository: No such file or directory\n")


def test_repository_may_come_from_the_settings(tmp_path, capsys, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("SARDONYX_REPOSITORY", "elsewhere")
    assert run(["check"], capsys)[:2] == (0, "0 models, 0 findings\n")


def test_check_names_model_file_and_field_and_exits_with_1(tmp_path, capsys):
    (tmp_path / "repo/m/1").mkdir(parents=True)
    (tmp_path / "repo/m/config.pbtxt").write_text('name: "other"')
    code, out, _ = run(["check", "repo"], capsys)
    assert code == 1
    finding, summary = out.splitlines()
    assert finding.startswith(f"m: {tmp_path}/repo/m/config.pbtxt: name: is 'other'")
    assert summary == "1 models, 1 findings"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sardonyx', '--help']\n"
        "from sardonyx.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import json; print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = python(code)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "serve" in done.stdout
    assert not {"numpy", "onnxruntime", "litestar", "tritonclient", "tokenizers", "sardonyx_export"} & set(loaded)


def test_help_is_instant():
    took = []
    for _ in range(3):
        start = time.perf_counter()
        assert python("from sardonyx.cli import main; main(['--help'])").returncode == 0
        took.append(time.perf_counter() - start)
    # 0.17 s on an idle core; the rest is for a busy one.
    assert min(took) < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "sardonyx: host: '0.0.0.0' can be reached from other machines and there are no API keys",
        ),
        ([], "no model repository: No such file or directory"),
    ],
)
def test_serve_refuses_in_one_line_what_it_cannot_serve(arguments, message):
    # In a process of its own: serving sets up logging for good.
    done = python("import sys; from sardonyx.cli import main; main(sys.argv[1:])", "serve", "/nowhere", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Block())
from sardonyx.cli import main
main(sys.argv[1:])
"""


def test_help_works_without_the_exporters_packages():
    done = python(BLOCK.format(blocked={"onnx", "gguf", "safetensors", "onnx_ir", "huggingface_hub"}), "--help")
    assert done.returncode == 0
    assert "export" in done.stdout


def raise_missing(name: str) -> Callable[[object], None]:
    def command(_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return command


@pytest.mark.parametrize("when", ["load", "run"])
def test_command_without_its_packages_names_the_extra(monkeypatch, capsys, when):
    class Command:
        name = "export"

        def load(self):
            return raise_missing("onnx")(None) if when == "load" else raise_missing("onnx")

    monkeypatch.setattr(cli, "entry_points", lambda group: [Command()])
    code, _, err = run(["export", "x.gguf"], capsys)
    assert (code, err) == (2, "sardonyx: onnx is not installed: pip install 'sardonyx[export]'\n")


def test_missing_module_of_our_own_is_not_blamed_on_the_installation(monkeypatch):
    class Command:
        name = "export"

        def load(self):
            return raise_missing("sardonyx_export.nowhere")

    monkeypatch.setattr(cli, "entry_points", lambda group: [Command()])
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        cli.main(["export"])


def test_serve_without_onnx_runtime_names_the_extra(tmp_path):
    done = python(BLOCK.format(blocked={"onnxruntime"}), "serve", str(tmp_path))
    assert done.returncode == 2
    assert "onnxruntime is not installed: pip install 'sardonyx[cpu]'" in done.stderr


def test_arguments_of_external_commands_pass_unchanged(monkeypatch, capsys):
    seen = []

    class Command:
        name = "extra"

        def load(self):
            return lambda arguments: seen.extend(arguments)

    monkeypatch.setattr(cli, "entry_points", lambda group: [Command()])
    assert run(["extra", "--help", "a b", "--flag=1", "-x"], capsys)[0] == 0
    assert seen == ["--help", "a b", "--flag=1", "-x"]


def test_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "sardonyx", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__


def test_export_is_among_the_commands():
    assert "export" in {entry_point.name for entry_point in cli.entry_points(group=cli.COMMANDS)}
    assert Path(cli.__file__).name == "cli.py"


def revouch(folder: Path) -> None:
    """Make the manifest agree with the files again, so that only their contents can be found wrong."""
    described = json.loads((folder / "manifest.json").read_text())
    graphs = [file for graph in described["graphs"].values() for file in [graph["model"], *graph["data"]]]
    for file in [*graphs, *described["files"]]:
        data = (folder / file["path"]).read_bytes()
        file.update(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    (folder / "manifest.json").write_text(json.dumps(described))


def test_deep_check_of_a_good_model_finds_nothing(tmp_path, capsys):
    make_language_model(tmp_path)
    assert run(["check", str(tmp_path), "--deep"], capsys)[:2] == (0, "1 models, 0 findings\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.onnx", b"no graph", "model.onnx"),
        ("chat_template.jinja", b"{% if %}", "chat_template.jinja: line 1"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
    ],
)
def test_deep_check_loads_what_a_plain_check_only_reads(tmp_path, capsys, name, content, message):
    folder = make_language_model(tmp_path)
    (folder / name).write_bytes(content)
    revouch(folder)
    assert run(["check", str(tmp_path)], capsys)[0] == 0
    code, out, _ = run(["check", str(tmp_path), "--deep"], capsys)
    assert code == 1
    assert message in out.splitlines()[0]


def test_deep_check_opens_no_graph_for_cards_where_there_is_none(tmp_path, capsys, monkeypatch):
    revouch(make_paged_repository(tmp_path))
    monkeypatch.setattr("sardonyx.runtime.providers.num_gpus", lambda: 0)
    assert run(["check", str(tmp_path), "--deep"], capsys)[:2] == (0, "1 models, 0 findings\n")


def test_flags_are_read_where_pydantic_is_loaded(tmp_path, capsys):
    pytest.importorskip("pydantic")
    (tmp_path / "s.toml").write_text("prot = 1")
    assert run(["serve", "--config", "s.toml"], capsys)[2] == (
        "sardonyx: s.toml: prot: is not a setting; did you mean port?\n"
    )
