import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from tests.tiny_tensors import add_sub, config_text, identity, serialize, truncated, unknown_operator, write_model

from sardonyx.errors import InvalidRequest
from sardonyx.metrics import Metrics
from sardonyx.serving.lifecycle import LoadFailed
from sardonyx.serving.loader import build_registry
from sardonyx.serving.override import FOLDER_PREFIX, MAX_FILES, check_override
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import InferCall, ModelOverride
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor

CONFIG = '{"backend": "onnxruntime", "max_batch_size": 8}'
FILES = {"1/model.onnx": serialize(add_sub())}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made in this test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    write_model(folder, "a", add_sub(), config=config_text(max_batch_size=4))
    return folder


def run(repository: Path, test: Callable[[Registry], Awaitable[None]]) -> None:
    async def main() -> None:
        settings = Settings(repository=repository, num_threads=1)
        registry = build_registry(settings, Metrics("test"))
        await registry.start(())
        try:
            await test(registry)
        finally:
            await registry.close()

    asyncio.run(main())


def tree(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


async def add(registry: Registry, name: str) -> int:
    one = np.ones((1, 16), np.int32)
    inputs = [Tensor("INPUT0", "INT32", one), Tensor("INPUT1", "INT32", one)]
    answer = await registry.served(name).infer(InferCall(inputs=inputs))
    return int(answer.outputs[0].array[0, 0])


def test_a_config_that_comes_along_takes_the_place_of_the_one_on_disk(repository: Path) -> None:
    async def test(registry: Registry) -> None:
        await registry.load("a", ModelOverride(config='{"max_batch_size": "16"}'))
        assert registry.served("a").config.max_batch_size == 16
        assert await add(registry, "a") == 2
        write_model(repository, "a", add_sub(), config=config_text(max_batch_size=2))
        await registry.load("a", only_if_changed=True)
        assert registry.served("a").config.max_batch_size == 2

    run(repository, test)


@pytest.mark.parametrize("name", ["a", "new"])
def test_files_that_come_along_are_the_whole_model_and_leave_nothing_behind(
    repository: Path, temporary: Path, name: str
) -> None:
    before = tree(repository)

    async def test(registry: Registry) -> None:
        await registry.load(name, ModelOverride(config=CONFIG, files={"2/model.onnx": FILES["1/model.onnx"]}))
        assert registry.versions(name) == [2]
        assert await add(registry, name) == 2
        assert is_empty(temporary)
        await registry.load(name)  # and they are kept for it
        assert await add(registry, name) == 2

    run(repository, test)
    assert tree(repository) == before


@pytest.mark.parametrize("data", [truncated(add_sub()), serialize(unknown_operator()), b""])
def test_files_that_cannot_be_loaded_leave_nothing_behind_and_the_old_version_serving(
    repository: Path, temporary: Path, data: bytes
) -> None:
    async def test(registry: Registry) -> None:
        await registry.load("a")
        with pytest.raises(LoadFailed) as caught:
            await registry.load("a", ModelOverride(config=CONFIG, files={"1/model.onnx": data}))
        assert str(temporary) not in caught.value.message
        assert FOLDER_PREFIX not in caught.value.message
        assert is_empty(temporary)
        assert await add(registry, "a") == 2

    run(repository, test)


def test_a_folder_and_a_file_of_one_name_are_refused(repository: Path, temporary: Path) -> None:
    async def test(registry: Registry) -> None:
        with pytest.raises(LoadFailed, match="x: cannot be written"):
            await registry.load("a", ModelOverride(config=CONFIG, files=FILES | {"1/model.onnx/x": b"x"}))
        assert is_empty(temporary)

    run(repository, test)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "..",
        "../x",
        "../../x",
        "1/../../x",
        "1/..",
        "1/../../../repository/a/config.pbtxt",
        "1//x",
        "./x",
        "1/./x",
        "1/",
        "1\\x",
        "1/x\0",
        "1/x\n",
        "/etc/passwd",
        "~/x",
        ".hidden",
        "1/.hidden",
        "01/model.onnx",
        "0/model.onnx",
        "-1/model.onnx",
        "1/" + "x/" * 5 + "x",
        "1/" + "x" * 129,
        "config.pbtxt",
        "1/\u00e9",
    ],
)
def test_paths_that_are_not_plain_are_refused_and_nothing_is_written(
    repository: Path, temporary: Path, path: str
) -> None:
    before = tree(repository.parent)

    async def test(registry: Registry) -> None:
        with pytest.raises(InvalidRequest, match=r"must stay within model directory|a parameter of its own"):
            await registry.load("a", ModelOverride(config=CONFIG, files=FILES | {path: b"evil"}))

    run(repository, test)
    assert is_empty(temporary)
    assert tree(repository.parent) == before


def test_links_of_the_repository_are_not_followed_when_files_come_along(repository: Path, temporary: Path) -> None:
    outside = repository.parent / "outside"
    outside.mkdir()
    (outside / "model.onnx").write_bytes(b"precious")
    (repository / "a/2").symlink_to(outside)
    (repository / "b").symlink_to(outside)

    async def test(registry: Registry) -> None:
        for name in ("a", "b"):
            files = {"2/model.onnx": FILES["1/model.onnx"], "2/new.txt": b"new"}
            await registry.load(name, ModelOverride(config=CONFIG, files=files))
            assert await add(registry, name) == 2

    run(repository, test)
    assert [path.name for path in outside.iterdir()] == ["model.onnx"]
    assert (outside / "model.onnx").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["../a", "a/b", "..", "", ".hidden", "a\n"])
def test_names_that_are_not_plain_are_refused(repository: Path, temporary: Path, name: str) -> None:
    async def test(registry: Registry) -> None:
        with pytest.raises(InvalidRequest, match="is not a model name"):
            await registry.load(name, ModelOverride(config=CONFIG, files=FILES))

    run(repository, test)
    assert is_empty(temporary)


def test_too_many_files_are_refused() -> None:
    files = {f"1/{number}": b"" for number in range(MAX_FILES + 1)}
    with pytest.raises(InvalidRequest, match="at most 256 files"):
        check_override("a", ModelOverride(config=CONFIG, files=files))


def test_external_data_may_come_along(repository: Path, temporary: Path) -> None:
    async def test(registry: Registry) -> None:
        files = {"1/model.onnx/model.onnx": serialize(identity()), "labels.txt": b"x"}
        await registry.load("new", ModelOverride(config='{"max_batch_size": 1}', files=files))
        assert registry.served("new").inputs[0].name == "INPUT0"

    run(repository, test)
