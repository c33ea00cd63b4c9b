"""Functions of torch that a trace writes as CUDA's own operators; see `traced_cuda`. They compute what torch's do."""

from typing import Any

import torch

from sardonyx_export.errors import ExportError

_DOMAIN = "com.microsoft"
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_BY_TOKEN = [0, 2, 1, 3]
"""Heads before positions, and back."""
_FLOAT = 1
"""ONNX's number of the type."""

_attention = torch.nn.functional.scaled_dot_product_attention
_group_norm = torch.nn.functional.group_norm


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Of (B, H, S, D) each.

    Raises:
        ExportError: it is not the plain one of UNets and VAEs.
    """
    if attn_mask is not None or dropout_p or is_causal or scale is not None or enable_gqa:
        raise ExportError("attention with a mask, dropout, groups or a scale of its own is not built")
    made: torch.Tensor = _Attention.apply(query, key, value, int(query.shape[1]))  # type: ignore[no-untyped-call]  # torch's
    return made


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Of pictures (B, C, y, x); others stay as torch writes them.

    The kernel takes two channels at once, of the same group.
    """
    if x.dim() != 4 or weight is None or bias is None or len(weight) % (2 * num_groups):
        return _group_norm(x, num_groups, weight, bias, eps)
    made: torch.Tensor = _GroupNorm.apply(x, weight, bias, num_groups, eps)  # type: ignore[no-untyped-call]  # torch's
    return made


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int) -> torch.Tensor:
        return _attention(query, key, value)

    @staticmethod
    def symbolic(graph: Any, query: Any, key: Any, value: Any, num_heads: int) -> Any:
        flat = graph.op("Constant", value_t=torch.tensor([0, 0, -1]))
        sides = [graph.op("Transpose", side, perm_i=_BY_TOKEN) for side in (query, key, value)]
        rows = [graph.op("Reshape", side, flat) for side in sides]
        attended = graph.op(f"{_DOMAIN}::MultiHeadAttention", *rows, num_heads_i=num_heads)
        by_head = graph.op("Constant", value_t=torch.tensor([0, 0, num_heads, -1]))
        return graph.op("Transpose", graph.op("Reshape", attended, by_head), perm_i=_BY_TOKEN)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float
    ) -> torch.Tensor:
        return _group_norm(x, num_groups, weight, bias, eps)

    @staticmethod
    def symbolic(graph: Any, x: Any, weight: Any, bias: Any, num_groups: int, eps: float) -> Any:
        # The kernel wants these in float32.
        vectors = [graph.op("Cast", vector, to_i=_FLOAT) for vector in (weight, bias)]
        normed = graph.op(
            f"{_DOMAIN}::GroupNorm",
            graph.op("Transpose", x, perm_i=_TO_LAST),
            *vectors,
            groups_i=num_groups,
            epsilon_f=eps,
            channels_last_i=1,
            activation_i=0,
        )
        return graph.op("Transpose", normed, perm_i=_TO_FIRST)
