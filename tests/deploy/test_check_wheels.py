import zipfile
from pathlib import Path

import pytest
from server.deploy.check_wheels import PYPROJECT, MissingWheel, main, platform_tags, requirements, resolve, wheel_names


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def write_wheel(folder: Path, name: str) -> None:
    """An empty wheel that pip takes for one."""
    project, version = name.split("-")[:2]
    with zipfile.ZipFile(folder / name, "w") as archive:
        info = f"{project}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")


def test_base_dependencies_and_those_of_extras_are_asked_for() -> None:
    base, wanted = requirements(PYPROJECT, []), requirements(PYPROJECT, ["cpu"])
    assert any(each.startswith("tokenizers") for each in base)
    assert [each for each in wanted if each not in base] == ["onnxruntime>=1.32"]


def test_tags_reach_from_the_machines_glibc_down_to_manylinux2014() -> None:
    tags = platform_tags("aarch64", "2.19")
    assert tags == [
        "manylinux_2_19_aarch64",
        "manylinux_2_18_aarch64",
        "manylinux_2_17_aarch64",
        "manylinux2014_aarch64",
    ]


def test_wheels_are_told_by_their_file_names() -> None:
    report = {"install": [{"download_info": {"url": f"https://x/{name}.whl"}} for name in ("b", "a")]}
    assert wheel_names(report) == ["a.whl", "b.whl"]


def test_only_wheels_that_the_machine_can_run_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for name in (
        "thing-1.0-cp311-cp311-manylinux_2_28_aarch64.whl",
        "thing-1.1-cp311-cp311-manylinux_2_34_aarch64.whl",
        "thing-1.2-cp311-cp311-manylinux_2_28_x86_64.whl",
        "thing-1.3-cp312-cp312-manylinux_2_28_aarch64.whl",
    ):
        write_wheel(tmp_path, name)
    found = resolve(["thing"], "3.11", platform_tags("aarch64", "2.28"))
    assert found == ["thing-1.0-cp311-cp311-manylinux_2_28_aarch64.whl"]
    with pytest.raises(MissingWheel, match="No matching distribution found for thing"):
        resolve(["thing"], "3.13", platform_tags("aarch64", "2.28"))


def test_a_missing_wheel_makes_the_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--python", "3.11", "--machine", "riscv64"]) == 1
    assert "Python 3.11, riscv64, glibc 2.28: ERROR: No matching distribution" in capsys.readouterr().out
