from pathlib import Path

import pytest
from tests.serving.version_folders import change_manifest
from tests.tiny_encoders import make_encoder_model
from tests.tiny_models import make_language_model
from tests.tiny_tensors import config_text, identity, write_model

from sardonyx.errors import ConfigError
from sardonyx.repository.layout import Repository, read_manifest
from sardonyx.runtime.device_memory import DeviceMemory
from sardonyx.serving.load_memory import LoadMemory
from sardonyx.serving.memory import DeviceBudgets

MUCH = 1 << 40
HOST = "this machine"


def refused_on(root: Path, name: str, *, num_gpus: int, host: int = MUCH, cards: tuple[int, ...] = ()) -> str:
    """The place that has no room for a model; empty where it may be loaded. Cards without a number are not asked."""

    def measure(gpu: int) -> DeviceMemory:
        return DeviceMemory(free_bytes=cards[gpu], total_bytes=MUCH)

    entry = Repository(root).entry(name)
    manifest = read_manifest(entry.version_path(entry.versions[-1]))
    memory = LoadMemory(DeviceBudgets(1.0, measure=measure), num_gpus, lambda: host)
    try:
        with memory.reserve(entry, manifest):
            return ""
    except ConfigError as error:
        return str(error).partition(" on ")[2].partition(" (")[0]


def test_weights_on_the_processor_need_room_on_the_host(tmp_path: Path) -> None:
    make_language_model(tmp_path, "text")
    make_encoder_model(tmp_path, "encoder")
    write_model(tmp_path, "tensors", identity(), config=config_text())
    for name in ("text", "encoder", "tensors"):
        assert refused_on(tmp_path, name, num_gpus=0) == ""
        assert refused_on(tmp_path, name, num_gpus=0, host=100) == HOST


def test_weights_on_cards_need_room_there_and_none_on_the_host(tmp_path: Path) -> None:
    group = "instance_group { kind: KIND_GPU gpus: [1] }"
    write_model(tmp_path, "tensors", identity(), config=config_text(rest=group))
    assert refused_on(tmp_path, "tensors", num_gpus=2, host=0, cards=(0, MUCH)) == ""
    assert refused_on(tmp_path, "tensors", num_gpus=2, host=0, cards=(MUCH, 100)) == "cuda:1"


def test_instances_on_several_cards_need_room_on_each(tmp_path: Path) -> None:
    write_model(tmp_path, "tensors", identity(), config=config_text())  # by default one on each card
    assert refused_on(tmp_path, "tensors", num_gpus=2, host=0, cards=(MUCH, MUCH)) == ""
    assert refused_on(tmp_path, "tensors", num_gpus=2, host=0, cards=(MUCH, 100)) == "cuda:1"


def test_an_encoder_for_cards_needs_room_there(tmp_path: Path) -> None:
    folder = make_encoder_model(tmp_path, "encoder")
    change_manifest(folder, target="cuda")
    assert refused_on(tmp_path, "encoder", num_gpus=1, host=0, cards=(100,)) == "cuda:0"
    assert refused_on(tmp_path, "encoder", num_gpus=1, host=0, cards=(MUCH,)) == ""


def test_a_language_model_for_cards_is_left_to_its_own_share(tmp_path: Path) -> None:
    change_manifest(make_language_model(tmp_path, "text"), target="cuda")
    assert refused_on(tmp_path, "text", num_gpus=1, host=0) == ""


def test_room_is_free_again_when_the_load_is_over(tmp_path: Path) -> None:
    make_encoder_model(tmp_path, "encoder")
    entry = Repository(tmp_path).entry("encoder")
    size = sum(path.stat().st_size for path in entry.version_path(1).rglob("*") if path.is_file())
    memory = LoadMemory(DeviceBudgets(1.0), 0, lambda: size)
    manifest = read_manifest(entry.version_path(1))
    with memory.reserve(entry, manifest), pytest.raises(ConfigError, match="being loaded"):  # noqa: SIM117
        with memory.reserve(entry, manifest):
            pass
    with memory.reserve(entry, manifest):
        pass
