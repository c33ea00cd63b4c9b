"""Pipelines for CUDA: their operators, and that the CPU's stand-ins for these say the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.export.diffusion_pipelines import make_pipeline
from tests.export.test_diffusion_pipeline import SIGNATURES, Exported, signature

from sardonyx.repository.check import check_repository
from sardonyx.runtime.session import open_session
from sardonyx_export.errors import ExportError
from sardonyx_export.request import ExportRequest, find_existing
from sardonyx_export.traced import quiet
from sardonyx_export.traced_shapes import reshape_by

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch", reason="the extra `export-torch` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export-torch` is not installed")

from sardonyx_export.traced_cuda import write_check_graph  # noqa: E402  # needs onnx_ir
from sardonyx_export.traced_graph import write_graph  # noqa: E402

MICROSOFT = "com.microsoft"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("sd-cuda")
    return Exported(make_pipeline(root / "Tiny-SD"), root / "repository", target="cuda")


@pytest.mark.slow
def test_manifest_says_for_what_and_how_it_was_verified(sd: Exported) -> None:
    manifest = sd.manifest
    assert (manifest.target, manifest.precision, manifest.activations) == ("cuda", "fp16", "fp16")
    assert manifest.source.weights == "F32 → float16; traced by torch"
    assert all(each.reference.startswith("with equal operators of the CPU, not on CUDA: ") for each in manifest.parity)
    assert len(manifest.parity) == len(SIGNATURES) + 1
    assert {path.suffix for path in sd.result.path.iterdir()} == {".json", ".onnx", ".data"}
    assert not list(sd.result.path.glob("*.check.onnx"))
    assert check_repository(sd.root) == []
    asked = {"source": str(sd.source), "repository": sd.root}
    assert find_existing(ExportRequest(**asked, target="cuda")) is not None
    assert find_existing(ExportRequest(**asked)) is None


@pytest.mark.slow
def test_graphs_keep_the_contract_and_an_opset_that_cuda_has_kernels_for(sd: Exported) -> None:
    for role, wanted in SIGNATURES.items():
        assert signature(sd.path(role)) == wanted, role
        opsets = {each.domain: each.version for each in load(sd.path(role)).opset_import}
        assert opsets.pop(MICROSOFT, 1) == 1
        assert opsets == {"": 20}


@pytest.mark.slow
def test_attention_and_group_norms_are_cudas(sd: Exported) -> None:
    nodes = load(sd.path("unet")).graph.node
    names = [node.op_type for node in nodes]
    assert (names.count("MultiHeadAttention"), names.count("GroupNorm")) == (8, 21)
    assert not {"Softmax", "InstanceNormalization", "Expand"} & set(names)
    norms = [attributes(node) for node in nodes if node.op_type == "GroupNorm"]
    assert {each["channels_last"] for each in norms} == {1}
    # Those before an attention have no SiLU behind them.
    assert [each["activation"] for each in norms].count(0) == 4


@pytest.mark.slow
def test_reshapes_take_constants_but_where_a_picture_gets_its_sides_back(sd: Exported) -> None:
    graph = load(sd.path("unet")).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    computed = [node for node in graph.node if node.op_type == "Reshape" and made.get(node.input[1]) != "Constant"]
    assert len(computed) == 4
    assert all(node.op_type != "Slice" or made[node.input[1]] == "Constant" for node in graph.node)


def test_stand_in_is_the_norm_of_torch_in_float32(tmp_path: Path) -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.GroupNorm(4, 16, eps=1e-3)
            self.plain = torch.nn.GroupNorm(4, 16)
            for each in (self.norm, self.plain):
                torch.nn.init.normal_(each.weight)
                torch.nn.init.normal_(each.bias)

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.silu(self.norm(x)) + 1, self.plain(x)

    torch.manual_seed(3)
    module, path = Norm().eval(), tmp_path / "norm.onnx"
    axes = dict.fromkeys(("x", "active", "normed"), ("batch", None, "y", "x"))
    x = torch.randn(2, 16, 5, 7) * 3 + 1
    trace(module, {"x": x}, ["active", "normed"], path, axes)
    assert [attributes(node)["activation"] for node in load(path).graph.node if node.op_type == "GroupNorm"] == [1, 0]
    check = write_check_graph(path)
    session = open_session(check, model_name="norm")
    try:
        for size in ((2, 16, 5, 7), (1, 16, 8, 3)):
            x = torch.randn(size)
            with torch.no_grad():
                expected = [each.numpy() for each in module(x)]
            for wanted, actual in zip(expected, session.run({"x": x.numpy()}).values(), strict=True):
                np.testing.assert_allclose(actual, wanted, atol=1e-5)
    finally:
        session.close()


def test_norm_whose_groups_have_an_odd_number_of_channels_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "norm.onnx"
    axes = dict.fromkeys(("x", "normed"), ("batch", None, "y", "x"))
    module = torch.nn.GroupNorm(4, 12).eval()
    trace(module, {"x": torch.randn(2, 12, 5, 7)}, ["normed"], path, axes)
    names = {node.op_type for node in load(path).graph.node}
    assert "InstanceNormalization" in names
    assert "GroupNorm" not in names


def test_attention_with_a_mask_is_refused(tmp_path: Path) -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    axes = dict.fromkeys(("x", "attended"), ("batch", None, "tokens", None))
    with pytest.raises(ExportError, match="attention with a mask, dropout, groups or a scale"):
        trace(Masked().eval(), {"x": torch.randn(2, 3, 5, 8)}, ["attended"], tmp_path / "masked.onnx", axes)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([(2, 30, 8), (3, 12, 8)], [(2, 30, 2, 4), (3, 12, 2, 4)], [0, 0, 2, 4]),
        ([(2, 5, 6, 8), (3, 4, 3, 8)], [(2, 30, 8), (3, 12, 8)], [0, -1, 8]),
        ([(2, 30, 8), (3, 12, 8)], [(2, 5, 6, 8), (3, 4, 3, 8)], None),
        ([(2, 4), (3, 4)], [(2,), (3,)], [0]),
        ([(2, 4), (3, 4, 1)], [(8,), (12,)], None),
    ],
)
def test_a_reshape_is_told_by_what_it_did(before: Any, after: Any, expected: list[int] | None) -> None:
    found = reshape_by([np.array(each) for each in before], [np.array(each) for each in after])
    assert (found if found is None else found.tolist()) == expected


def trace(module: Any, inputs: dict[str, Any], outputs: list[str], path: Path, axes: dict[str, Any]) -> None:
    with quiet():
        write_graph(module, inputs, outputs, path, axes=axes, target="cuda")


def load(path: Path) -> Any:
    return onnx.load(str(path), load_external_data=False)


def attributes(node: Any) -> dict[str, Any]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
