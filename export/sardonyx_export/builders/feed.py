"""The graph ``feed``: which token each place of a step holds, where some tokens were drawn on the device.

It runs before the decoder of steps over blocks, on the same device. A step is launched before the host knows what the
one before it has drawn; such tokens go from the sampler's output to the decoder's input and never leave the device.
"""

from pathlib import Path

import numpy as np

from sardonyx_export.builders.graph import GraphWriter

FEED_FILE = "feed.onnx"


def build_feed(folder: Path, file_name: str = FEED_FILE) -> list[Path]:
    """Write the graph.

    Its inputs are tokens (T) int64, ids from the host; token_ids (N) int64, the sampler's last output; source (T)
    int64, a row of `token_ids` that stands for the token, or -1. Its output is input_ids (T) int64.

    Args:
        folder: an existing one without this file.
        file_name: of the graph.

    Returns:
        The graph. It has no weights, and so no external data.
    """
    with GraphWriter(folder, file_name) as graph:
        graph.input("tokens", np.int64, ["T"])
        graph.input("token_ids", np.int64, ["N"])
        graph.input("source", np.int64, ["T"])
        graph.output("input_ids", np.int64, ["T"])
        zero = graph.constant("zero", np.array(0, np.int64))
        # Where there is no source any row may be gathered, and is not looked at.
        row = graph.node("Max", ["source", zero], "row")
        drawn = graph.node("Gather", ["token_ids", row], "drawn", axis=0)
        is_known = graph.node("Less", ["source", zero], "is_known")
        graph.node("Where", [is_known, "tokens", drawn], "input_ids")
        path, data = graph.save("feed")
    data.unlink()
    return [path]
