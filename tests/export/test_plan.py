from pathlib import Path

import gguf
import pytest
from tests.export.checkpoints import tiny_llama_metadata, tiny_llama_tensors, write_gguf, write_llama_folder

from sardonyx_export.errors import ExportError
from sardonyx_export.plan import make_plan
from sardonyx_export.sources.gguf_file import GgufFile
from sardonyx_export.sources.safetensors_folder import SafetensorsFolder


def _gguf(path: Path, qtype: gguf.GGMLQuantizationType, *, except_embedding: bool = True) -> GgufFile:
    tensors = tiny_llama_tensors()
    quantised = {
        name: qtype
        for name, value in tensors.items()
        if value.ndim == 2 and not (except_embedding and name.startswith("token_embd"))
    }
    return GgufFile(write_gguf(path, metadata=tiny_llama_metadata(), tensors=tensors, quantised=quantised), uri="x")


@pytest.mark.parametrize(
    ("qtype", "precision"),
    [
        (gguf.GGMLQuantizationType.Q4_0, "int4"),
        (gguf.GGMLQuantizationType.Q4_1, "int4"),
        (gguf.GGMLQuantizationType.Q5_1, "int8"),
        (gguf.GGMLQuantizationType.Q8_0, "int8"),
        (gguf.GGMLQuantizationType.F16, "int8"),
    ],
)
def test_auto_keeps_the_sources_own_bits(tmp_path: Path, qtype: gguf.GGMLQuantizationType, precision: str) -> None:
    plan = make_plan(_gguf(tmp_path / "a.gguf", qtype), name="a")
    assert plan.precision == precision


def test_auto_takes_int8_for_full_weights_and_an_asked_for_precision_wins(tmp_path: Path) -> None:
    checkpoint = SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny")
    assert make_plan(checkpoint, name="tiny").precision == "int8"
    assert make_plan(checkpoint, name="tiny", precision="fp32").precision == "fp32"


def test_auto_takes_int8_where_activations_are_rounded_by_row(tmp_path: Path) -> None:
    checkpoint = _gguf(tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q4_0)
    assert make_plan(checkpoint, name="tiny", activations="int8_rows").precision == "int8"


def test_auto_takes_sixteen_bits_for_cuda_unless_the_source_has_four(tmp_path: Path) -> None:
    checkpoint = SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny")
    plan = make_plan(checkpoint, name="tiny", target="cuda")
    assert plan.precision == "fp16"
    assert plan.estimated_bytes == 2 * plan.num_parameters
    assert make_plan(checkpoint, name="tiny", target="cuda", activations="bf16").precision == "bf16"
    coarse = _gguf(tmp_path / "a.gguf", gguf.GGMLQuantizationType.Q4_0)
    assert make_plan(coarse, name="tiny", target="cuda").precision == "int4"


def test_a_plan_says_what_will_be_built(tmp_path: Path) -> None:
    checkpoint = SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny")
    plan = make_plan(checkpoint, name="tiny", precision="fp32")
    num_parameters = sum(checkpoint.tensor(name).read().size for name in checkpoint.names())
    assert plan.architecture == "LlamaForCausalLM"
    assert plan.max_model_len == 256
    assert plan.num_parameters == num_parameters
    assert plan.storage == {"F32": num_parameters}
    assert plan.estimated_bytes == 4 * num_parameters


@pytest.mark.parametrize("length", [0, -1, 257])
def test_more_positions_than_the_model_has_are_refused(tmp_path: Path, length: int) -> None:
    checkpoint = SafetensorsFolder(write_llama_folder(tmp_path / "tiny"), uri="tiny")
    with pytest.raises(ExportError, match="this model takes 1 to 256"):
        make_plan(checkpoint, name="tiny", max_model_len=length)
    assert make_plan(checkpoint, name="tiny", max_model_len=128).max_model_len == 128
