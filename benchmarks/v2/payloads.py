"""One inference request as the bytes of each protocol, and the same request through Triton's own client."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2

from v2.models import Model

HTTP_JSON, HTTP_BINARY, GRPC = PROTOCOLS = ("http-json", "http-binary", "grpc")

_GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Payload:
    path: str
    headers: dict[str, str]
    body: bytes


def payload(model: Model, name: str, protocol: str) -> Payload:
    """A request to the model that a server calls `name`: tensors travel in both directions as `protocol` says."""
    if protocol == GRPC:
        return _grpc_payload(model, name)
    body, json_size = tritonclient.http.InferenceServerClient.generate_request_body(
        _http_inputs(model, binary=protocol == HTTP_BINARY),
        outputs=_http_outputs(model, binary=protocol == HTTP_BINARY),
    )
    headers = {"content-type": "application/json"}
    if json_size is not None:
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(json_size)}
    return Payload(f"/v2/models/{name}/infer", headers, body)


def _grpc_payload(model: Model, name: str) -> Payload:
    request = service_pb2.ModelInferRequest(model_name=name)
    for tensor, array in model.inputs.items():
        request.inputs.add(name=tensor, datatype=_datatype(array), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for tensor in model.outputs:
        request.outputs.add(name=tensor)
    message = request.SerializeToString()
    # gRPC over HTTP/2: a byte that says "not compressed", four of length, the message.
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    return Payload(_GRPC_PATH, {"content-type": "application/grpc", "te": "trailers"}, framed)


def check(model: Model, name: str, protocol: str, http_port: int, grpc_port: int) -> None:
    """Ask once through Triton's client and compare with what ONNX Runtime said.

    Raises:
        AssertionError: other numbers.
        tritonclient.utils.InferenceServerException: the server refused.
    """
    if protocol == GRPC:
        inputs = [
            _filled(tritonclient.grpc.InferInput(tensor, array.shape, _datatype(array)), array)
            for tensor, array in model.inputs.items()
        ]
        with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}") as client:
            answer = client.infer(name, inputs)
    else:
        binary = protocol == HTTP_BINARY
        inputs = _http_inputs(model, binary=binary)
        with tritonclient.http.InferenceServerClient(f"127.0.0.1:{http_port}", network_timeout=120) as client:
            answer = client.infer(name, inputs, outputs=_http_outputs(model, binary=binary))
    for tensor, expected in model.outputs.items():
        # minilm sums in another order when another number of threads shares the work.
        np.testing.assert_allclose(answer.as_numpy(tensor), expected, rtol=1e-3, atol=1e-3, err_msg=f"{name} {tensor}")


def _http_inputs(model: Model, *, binary: bool) -> list[Any]:
    return [
        _filled(tritonclient.http.InferInput(tensor, array.shape, _datatype(array)), array, binary_data=binary)
        for tensor, array in model.inputs.items()
    ]


def _http_outputs(model: Model, *, binary: bool) -> list[Any]:
    return [tritonclient.http.InferRequestedOutput(tensor, binary_data=binary) for tensor in model.outputs]


def _filled(tensor: Any, array: np.ndarray, **options: bool) -> Any:
    tensor.set_data_from_numpy(array, **options)
    return tensor


def _datatype(array: np.ndarray) -> str:
    return tritonclient.utils.np_to_triton_dtype(array.dtype)
