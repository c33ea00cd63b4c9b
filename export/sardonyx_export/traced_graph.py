"""A torch module traced into one ONNX graph, with its weights in one file beside it.

The older of torch's two exporters does the tracing. The newer one reasons about every size as a symbol: a UNet of
eight attention layers took it 75 to 160 seconds where this one takes three, with the same numbers. What this one may
get wrong, a size or a branch fixed by the sample, is for the caller to catch by running the graph at other shapes.

Scaled dot-product attention becomes the operator ``Attention``: on the CPU it took 0.55 s where its parts took 2.4 s
(8 heads, 4,096 positions, two threads), and on CUDA it never holds the products of all positions. The old exporter
knows opsets to 20 only, so the operator goes through it under a name of ours, and the graph is of opset 23. Graphs for
CUDA are of opset 20 and have other operators there, see `traced_cuda`.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sardonyx_export.errors import ExportError
from sardonyx_export.plan import Target

_TRACED_OPSET = 20
_OPSET = 23
"""The first with ``Attention``."""
_OWN_DOMAIN = "sardonyx"


def write_graph(
    module: Any,
    inputs: Mapping[str, Any],
    outputs: Sequence[str],
    path: Path,
    *,
    axes: Mapping[str, Sequence[str | None]],
    target: Target = "cpu",
) -> list[str]:
    """Trace a module into `path`, and its weights into ``<path>.data``.

    Args:
        module: a torch module in evaluation mode that takes `inputs` in their order, and gives a tensor or a tuple.
        inputs: sample tensors by name. Sizes that differ from each other keep the trace from mixing axes up.
        outputs: names.
        path: of the graph, in an existing folder.
        axes: for every input and output the names of its axes; ``None`` where the size is fixed.
        target: whose operators the graph has.

    Returns:
        The names of both files, the graph first.

    Raises:
        ExportError: the module cannot be traced.
    """
    import onnx_ir
    import torch
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from sardonyx_export.traced_cuda import cuda_operators, fuse_activations

    dynamic = {
        name: {axis: symbol for axis, symbol in enumerate(symbols) if symbol is not None}
        for name, symbols in axes.items()
    }
    # A folder beside the graph and not in /tmp, which may be small: above 2 GB each weight becomes a file of its own.
    folder = Path(tempfile.mkdtemp(prefix="trace-", dir=path.parent))
    try:
        with torch.no_grad():
            found = module(*inputs.values())
        shapes = {name: value.shape for name, value in inputs.items()}
        shapes |= dict(
            zip(outputs, [value.shape for value in (found if isinstance(found, tuple) else (found,))], strict=True)
        )
        with torch.no_grad(), cuda_operators() if target == "cuda" else _attention_kept_whole():
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(folder / "traced.onnx"),
                dynamo=False,
                opset_version=_TRACED_OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=dynamic,
            )
        traced = onnx_ir.load(folder / "traced.onnx")
        if target == "cuda":
            fuse_activations(traced)
        else:
            _raise_opset(traced)
        for value in (*traced.graph.inputs, *traced.graph.outputs):
            name = str(value.name)
            value.shape = onnx_ir.Shape([symbol or size for symbol, size in zip(axes[name], shapes[name], strict=True)])
        ClearMetadataAndDocStringPass()(traced)
        onnx_ir.save(traced, str(path), external_data=f"{path.name}.data")
    except Exception as error:  # whatever a foreign library says of a module that it cannot trace
        line = str(error).strip().partition("\n")[0]
        raise ExportError(f"{path.stem} cannot be traced: {type(error).__name__}: {line:.300}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [path.name, f"{path.name}.data"]


@contextmanager
def _attention_kept_whole() -> Iterator[None]:
    """Scaled dot-product attention is one operator in what is exported meanwhile."""
    import torch

    name = "aten::scaled_dot_product_attention"
    operators: Any = torch.onnx  # does not say that it has these two
    operators.register_custom_op_symbolic(name, _attention, _TRACED_OPSET)
    try:
        yield
    finally:
        operators.unregister_custom_op_symbolic(name, _TRACED_OPSET)


def _attention(
    graph: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    dropout: Any,
    is_causal: Any,
    scale: Any,
    grouped: Any = None,
) -> Any:
    """Of the call's arguments as nodes of the trace; see ``torch.nn.functional.scaled_dot_product_attention``."""
    from torch.onnx import symbolic_helper

    if not symbolic_helper._is_none(mask):
        raise ExportError("attention with a mask is not built")
    constants = (symbolic_helper._maybe_get_const(dropout, "f"), symbolic_helper._maybe_get_const(is_causal, "b"))
    if any(constants) or not symbolic_helper._is_none(scale):
        raise ExportError("attention with dropout, a causal mask or a scale of its own is not built")
    made = graph.op(f"{_OWN_DOMAIN}::Attention", query, key, value)
    made.setType(query.type())
    return made


def _raise_opset(model: Any) -> None:
    """Give the operator its own name, and the graph the opset that has it. The others mean the same in both."""
    for node in model.graph.all_nodes():
        if node.domain == _OWN_DOMAIN:
            node.domain = ""
    model.graph.opset_imports.pop(_OWN_DOMAIN, None)
    model.graph.opset_imports[""] = _OPSET
