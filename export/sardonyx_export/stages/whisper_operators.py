"""Operators of Whisper for CUDA in numpy, beside those of `stages.encoder_operators`."""

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from sardonyx_export.stages.attention_operator import Tensor
from sardonyx_export.stages.encoder_operators import ENCODER_OPERATORS


class Conv(OpRun):
    """ONNX's own, of one axis in float32: a product for each tap. onnx's takes each window out by itself."""

    op_domain = ""

    def _run(self, *inputs: Tensor, **attributes: Any) -> tuple[Tensor, ...]:
        x, weight, bias = inputs
        assert x.dtype == weight.dtype == bias.dtype == np.float32, "no kernel for bf16 in this opset"
        (size,), (stride,) = attributes["kernel_shape"], attributes["strides"]
        assert x.ndim == 3, "not implemented: pictures"
        assert attributes.get("group", 1) == 1, "not implemented: groups"
        assert list(attributes.get("dilations") or [1]) == [1], "not implemented: dilations"
        padded = np.pad(x, ((0, 0), (0, 0), tuple(attributes["pads"])))
        last = padded.shape[2] - size + 1
        taps = [weight[:, :, tap] @ padded[:, :, tap : tap + last : stride] for tap in range(size)]
        return (np.sum(taps, axis=0, dtype=np.float32) + bias[:, None],)


WHISPER_OPERATORS: list[type[OpRun]] = [*ENCODER_OPERATORS, Conv]
