import onnxruntime as ort
import pytest

from sardonyx.errors import ConfigError
from sardonyx.runtime.providers import execution_provider, num_gpus


def test_cpu_is_always_there():
    assert execution_provider("cpu").ort_name == "CPUExecutionProvider"


def test_provider_that_this_build_lacks_is_refused_with_what_to_install():
    with pytest.raises(ConfigError, match=r"'cuda' is not part .* install sardonyx\[cuda\]"):
        execution_provider("cuda")


def test_tensorrt_comes_with_cuda():
    with pytest.raises(ConfigError, match=r"'tensorrt' is not part .* install sardonyx\[cuda\]"):
        execution_provider("tensorrt")


def test_unknown_provider_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'tpu' is not known; known are cpu, cuda"):
        execution_provider("tpu")


def test_options_are_added_to_those_that_a_provider_is_opened_with():
    provider = execution_provider("cpu", {"arena_extend_strategy": "kNextPowerOfTwo"})
    assert provider.options == {"arena_extend_strategy": "kNextPowerOfTwo"}
    assert execution_provider("cpu").options == {}


def card(root, name):
    (root / "proc/driver/nvidia/gpus" / name).mkdir(parents=True)


def test_cards_do_not_count_where_the_installed_runtime_cannot_use_them(tmp_path):
    card(tmp_path, "0000:01:00.0")
    assert num_gpus(tmp_path) == 0


@pytest.mark.parametrize(("visible", "count"), [(None, 2), ("1", 1), ("0,1,2", 2), ("", 0)])
def test_cards_are_those_of_the_driver_that_the_process_may_see(tmp_path, monkeypatch, visible, count):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus(tmp_path) == 0
    card(tmp_path, "0000:01:00.0")
    card(tmp_path, "0000:02:00.0")
    assert num_gpus(tmp_path) == count


def test_jetson_has_one_card_and_no_folder_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvhost-gpu").touch()
    assert num_gpus(tmp_path) == 1
