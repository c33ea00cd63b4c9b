import pytest

from sardonyx.errors import ConfigError
from sardonyx.runtime.providers import execution_provider


def test_cpu_is_always_there():
    assert execution_provider("cpu").ort_name == "CPUExecutionProvider"


def test_provider_that_this_build_lacks_is_refused_with_what_to_install():
    with pytest.raises(ConfigError, match=r"'cuda' is not part .* install sardonyx\[cuda\]"):
        execution_provider("cuda")


def test_unknown_provider_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="'tpu' is not known; known are cpu, cuda"):
        execution_provider("tpu")
