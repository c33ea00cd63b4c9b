from types import SimpleNamespace

import pytest

from sardonyx.errors import ConfigError
from sardonyx.runtime.tensorrt_library import compute_capability, find_version, tensorrt_version


@pytest.fixture
def folder(tmp_path):
    """ONNX Runtime's libraries, of which only what they need can be read."""
    needed = b"\0libcudart.so.13\0libnvinfer.so.10\0libnvinfer_plugin.so.10\0libnvonnxparser.so.10\0"
    (tmp_path / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF" + needed)
    return tmp_path


def library(number: int) -> SimpleNamespace:
    return SimpleNamespace(getInferLibVersion=lambda: number)


@pytest.mark.parametrize(
    ("number", "version"), [(101303, (10, 13, 3)), (110401, (11, 4, 1)), (100000, (10, 0, 0)), (8601, (8, 0, 0))]
)
def test_version_is_the_one_that_the_library_tells(folder, number, version):
    assert find_version(folder, None, lambda _: library(number)) == version


def test_all_that_the_provider_needs_is_loaded_the_parser_last(folder):
    loaded = []
    find_version(folder, None, lambda name: loaded.append(name) or library(101303))
    assert loaded == ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"]


def test_library_of_nvidias_wheel_is_loaded_from_where_it_lies(folder, tmp_path):
    wheel = tmp_path / "tensorrt_libs"
    wheel.mkdir()
    (wheel / "libnvinfer.so.10").touch()
    loaded = []
    find_version(folder, wheel, lambda name: loaded.append(name) or library(101303))
    assert loaded[:2] == [str(wheel / "libnvinfer.so.10"), "libnvinfer_plugin.so.10"]


def test_missing_library_is_named_with_what_to_install(folder):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(ConfigError, match=r"needs libnvinfer.so.10, which cannot be loaded .*; install TensorRT 10$"):
        find_version(folder, None, load)


def test_runtime_without_the_provider_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no execution provider tensorrt"):
        find_version(tmp_path, None, lambda _: library(101303))


def test_installed_runtime_has_no_tensorrt():
    with pytest.raises(ConfigError, match="has no execution provider tensorrt"):
        tensorrt_version()


def driver(*, failing: str = "") -> SimpleNamespace:
    def get_device(device, ordinal):
        device._obj.value = ordinal.value
        return 0

    def get_attribute(value, attribute, device):
        value._obj.value = {75: 9, 76: device.value}[attribute.value]
        return 0

    calls = {"cuInit": lambda _: 0, "cuDeviceGet": get_device, "cuDeviceGetAttribute": get_attribute}
    if failing:
        calls[failing] = lambda *_: 101
    return SimpleNamespace(**calls)


def test_compute_capability_is_that_of_the_card():
    assert [compute_capability(card, lambda _: driver()) for card in (0, 1)] == [90, 91]


def test_card_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no engine can be built for cuda:1: cuDeviceGet failed with 101"):
        compute_capability(1, lambda _: driver(failing="cuDeviceGet"))


def test_machine_without_a_driver_is_refused():
    def load(_):
        raise OSError("no such file")

    with pytest.raises(ConfigError, match=r"no engine can be built for cuda:0: no libcuda.so.1"):
        compute_capability(0, load)
