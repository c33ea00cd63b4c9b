"""A decoder for CUDA against what the source's weights say, on machines with and without a card.

What is run is the very graph that was written, all of its nodes and weights, but in numpy (see `stages.operators`):
its operators exist on CUDA only. So wiring, weights and their rounding are verified, and CUDA's own kernels are not.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sardonyx.repository.families import LanguageModel
from sardonyx_export.stages.operators import MappedEvaluator

Array = npt.NDArray[np.float32]
Row = tuple[Sequence[int], int, Sequence[int]]
"""New token ids, the number of tokens before them, and the sequence's blocks."""


def run_paged_graph(path: Path, model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """Logits after every token. Prompts are prefilled in two chunks that share steps, in blocks out of order.

    Args:
        path: of the graph.
        model: what the manifest will say of it.
        prompts: token ids.

    Returns:
        One (length, V) array for each prompt.
    """
    evaluator = MappedEvaluator(path)
    block_size = model.kv.block_size
    assert block_size is not None
    counts = [-(-len(prompt) // block_size) for prompt in prompts]
    # The last ones first, and block 0 is nobody's.
    free = list(range(1, sum(counts) + 1))
    blocks = [[free.pop() for _ in range(count)] for count in counts]
    caches = empty_caches(evaluator, sum(counts) + 1)
    outputs: list[list[Array]] = [[] for _ in prompts]
    # Different cuts, so that no step holds equal chunks.
    cuts = [len(prompt) * (i + 1) // (len(prompts) + 1) for i, prompt in enumerate(prompts)]
    for is_first in (True, False):
        parts = [
            (i, prompt[:cut] if is_first else prompt[cut:], 0 if is_first else cut)
            for i, (prompt, cut) in enumerate(zip(prompts, cuts, strict=True))
        ]
        parts = [part for part in parts if part[1]]
        if not parts:
            continue
        rows = [(ids, num_past, blocks[i]) for i, ids, num_past in parts]
        lengths = [len(ids) for _, ids, _ in parts]
        feeds = step_feeds(rows, block_size, range(sum(lengths)))
        (logits,) = evaluator.run(["logits"], feeds | caches)
        for (i, _, _), piece in zip(parts, np.split(logits, np.cumsum(lengths)[:-1]), strict=True):
            outputs[i].append(piece)
    return [np.concatenate(pieces) for pieces in outputs]


def empty_caches(evaluator: MappedEvaluator, num_blocks: int) -> dict[str, npt.NDArray[np.generic]]:
    """Zeros for every ``past_key_values`` of the graph, by name; the graph writes into them."""
    caches = {}
    for value in evaluator.onnx_graph_.input:
        if value.name.startswith("past_key_values."):
            _, *sizes = (axis.dim_value for axis in value.type.tensor_type.shape.dim)
            caches[value.name] = np.zeros((num_blocks, *sizes), evaluator.dtype(value))
    return caches


def step_feeds(
    rows: Sequence[Row], block_size: int, wanted: Sequence[int]
) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
    """A step's inputs without caches, by the graph's names.

    Args:
        rows: of the step.
        block_size: positions of a block.
        wanted: packed indices of the tokens whose logits are wanted.
    """
    lengths = np.array([len(ids) for ids, _, _ in rows], np.int32)
    num_past = np.array([past for _, past, _ in rows], np.int32)
    table = np.full((len(rows), max(len(blocks) for *_, blocks in rows)), -1, np.int32)
    slots: list[int] = []
    for row, (ids, past, blocks) in enumerate(rows):
        table[row, : len(blocks)] = blocks
        positions = range(past, past + len(ids))
        slots += [blocks[position // block_size] * block_size + position % block_size for position in positions]
    return {
        "input_ids": np.array([token for ids, _, _ in rows for token in ids], np.int64),
        "logits_index": np.array(wanted, np.int64),
        "block_table": table,
        "cumulative_sequence_length": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "past_seqlens": num_past,
        "slot_mapping": np.array(slots, np.int32),
        "attention_metadata": np.array([lengths.max(), (num_past + lengths).max(), 0], np.int32),
    }
