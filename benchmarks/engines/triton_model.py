"""A model of Triton's Python backend that runs the ONNX file beside it. Triton wants it to be called `model.py`.

Runs inside Triton's stub process. Its numpy has to be older than 2: with a newer one the backend refuses outputs for
their shape.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as triton


class TritonPythonModel:
    """All requests of an `execute` call in one run where the model batches, each by itself where it does not."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"])
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.spin_duration_us", parameters["spin_duration_us"])
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        self._batches = config["max_batch_size"] > 0

    def execute(self, requests):
        feeds = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        if len(feeds) == 1 or not self._batches:
            return [self._response(self._session.run(self._outputs, feed)) for feed in feeds]
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self._inputs}
        results = self._session.run(self._outputs, joined)
        responses, start = [], 0
        for feed in feeds:
            end = start + len(feed[self._inputs[0]])
            responses.append(self._response([result[start:end] for result in results]))
            start = end
        return responses

    def _response(self, arrays):
        tensors = [triton.Tensor(name, array) for name, array in zip(self._outputs, arrays, strict=True)]
        return triton.InferenceResponse(output_tensors=tensors)
