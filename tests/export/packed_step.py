"""Running a packed-step graph by hand: one cache, bound in place, and rows given as lists of tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort


class PackedStep:
    """A decoder's graph with its cache.

    Args:
        model: path of ``model.onnx``.
        max_model_len: what the graph was built for.
        num_rows: B.
        max_chunk: S at most.
    """

    def __init__(self, model: Path, max_model_len: int, *, num_rows: int = 1, max_chunk: int | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._max_model_len = max_model_len
        capacity = max_model_len + (max_chunk or max_model_len) - 1
        caches = [port for port in self._session.get_inputs() if port.name.startswith("past_key_values.")]
        # Whatever an idle or a padding position holds must not matter.
        self._cache = {
            port.name: ort.OrtValue.ortvalue_from_numpy(
                np.full((num_rows, port.shape[1], capacity, port.shape[3]), 7.0, np.float32)
            )
            for port in caches
        }
        self.lengths = [0] * num_rows

    def run(self, rows: Mapping[int, Sequence[int]], *, only_last: bool = False) -> npt.NDArray[np.float32]:
        """Append tokens to some rows in one step; the others are idle.

        Returns:
            Logits of all new tokens, row after row, or of each row's last.
        """
        chunk = max(map(len, rows.values()))
        ids, scatter, wanted = [], [], []
        gather = np.zeros((len(self.lengths), chunk), np.int64)
        queries = np.zeros(len(self.lengths), np.int32)
        for row, tokens in rows.items():
            gather[row, : len(tokens)] = np.arange(len(ids), len(ids) + len(tokens))
            scatter += [row * chunk + position for position in range(len(tokens))]
            ids += tokens
            wanted += [len(ids) - 1] if only_last else range(len(ids) - len(tokens), len(ids))
            queries[row] = len(tokens)
            self.lengths[row] += len(tokens)
        inputs = {
            "input_ids": np.array(ids, np.int64),
            "row_gather": gather,
            "row_scatter": np.array(scatter, np.int64),
            "seqlens_k": np.maximum(np.array(self.lengths, np.int32) - 1, 0),
            "query_seqlens": queries,
            "total_sequence_length": np.array(self._max_model_len, np.int32),
            "logits_index": np.array(wanted, np.int64),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        names = [port.name for port in self._session.get_outputs()]
        logits: npt.NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        assert logits.shape == (len(wanted), self._session.get_outputs()[names.index("logits")].shape[1])
        return logits
