"""What the tests with Triton's own clients share: a repository of tensor models, and both synchronous clients."""

import asyncio
import http.client
import shutil
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.http
from tests.conformance.process import ServerProcess
from tests.tiny_models import TinyDecoder, make_language_model
from tests.tiny_tensors import config_text, identity, slow, write_model
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

EXAMPLES = Path(__file__).parents[2] / "model_repository"
DATATYPES = (
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
)

# One status in both protocols.
INVALID = ("400", "INVALID_ARGUMENT")
NOT_FOUND = ("404", "NOT_FOUND")
NOT_READY = ("503", "UNAVAILABLE")
UNSUPPORTED = ("501", "UNIMPLEMENTED")
FORBIDDEN = ("403", "PERMISSION_DENIED")
NO_KEY = ("401", "UNAUTHENTICATED")

Array = npt.NDArray[Any]


def copy_examples(root: Path, *names: str) -> None:
    """Copy example models into a repository; all of them where none is named."""
    for folder in EXAMPLES.glob("simple*"):
        if not names or folder.name in names:
            shutil.copytree(folder, root / folder.name)


def write_repository(root: Path) -> None:
    """The examples, an identity of every datatype and of special shapes, a slow and a cached one, a language model."""
    copy_examples(root)
    for datatype in DATATYPES:
        write_model(root, f"identity_{datatype.lower()}", identity(datatype), config=config_text())
    write_model(root, "one_text", identity("BYTES", shape=(1,)), config=config_text())
    write_model(root, "two_open", identity("FP16", shape=(-1, -1)), config=config_text())
    write_model(root, "three_inputs", identity("FP32", num_tensors=3), config=config_text())
    one_after_the_other = "dynamic_batching { default_queue_policy { max_queue_size: 1 } }\ninstance_group { count: 1 }"
    write_model(root, "slow", slow(), config=config_text(max_batch_size=1, rest=one_after_the_other))
    write_model(root, "cached", identity("INT32"), config=config_text(rest="response_cache { enable: true }"))
    make_language_model(root, sizes=TinyDecoder(max_model_len=2048))


class Caller:
    """One of tritonclient's synchronous clients, with what differs between HTTP and gRPC taken care of."""

    def __init__(self, protocol: str, server: ServerProcess, **options: Any) -> None:
        self.protocol = protocol
        self.server = server
        self.api: ModuleType = tritonclient.http if protocol == "http" else tritonclient.grpc
        self.client = self.api.InferenceServerClient(address(server, protocol), **options)

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def inputs(self, tensors: Mapping[str, Array], **options: Any) -> list[Any]:
        return inputs(self.api, tensors, **options)

    def outputs(self, *names: str, **options: Any) -> list[Any]:
        return [self.api.InferRequestedOutput(name, **options) for name in names]

    def infer(self, model: str, tensors: Mapping[str, Array], **options: Any) -> Any:
        if "headers" in options:
            options["headers"] = dict(options["headers"])  # the client over HTTP adds its own to them
        return self.client.infer(model, self.inputs(tensors), **options)

    def refusal(self, model: str, tensors: Mapping[str, Array], **options: Any) -> "Refusal":
        """What is said to an inference that has to fail."""
        return self.refused(lambda: self.infer(model, tensors, **options))

    def refused(self, call: Any) -> "Refusal":
        """What is said to a call that has to fail."""
        try:
            call()
        except InferenceServerException as error:
            return Refusal((error.status() or "").removeprefix("StatusCode."), error.message())
        raise AssertionError("it was not refused")

    def show(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What a method that only looks gives, as JSON. Protobuf's JSON has 64-bit numbers as text."""
        if self.protocol == "grpc":
            options["as_json"] = True
        return getattr(self.client, method)(*arguments, **options)

    def index(self) -> dict[str, dict[str, str]]:
        """The repository index by model; of models with one version."""
        rows = self.show("get_model_repository_index")
        return {row["name"]: row for row in (rows if self.protocol == "http" else rows["models"])}

    def statistics(self, model: str) -> Any:
        """Of a model with one version, with numbers as numbers."""
        (row,) = self.show("get_inference_statistics", model)["model_stats"]
        return as_numbers(row)


class Refusal(NamedTuple):
    """An error of either client."""

    status: str
    """HTTP's number or the name of gRPC's code; see `INVALID` and so on for what are one and the same."""
    message: str


def address(server: ServerProcess, protocol: str) -> str:
    return f"127.0.0.1:{server.port if protocol == 'http' else server.grpc_port}"


def inputs(api: ModuleType, tensors: Mapping[str, Array], **options: Any) -> list[Any]:
    """As one of the four clients wants them."""
    made = []
    for name, array in tensors.items():
        each = api.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        each.set_data_from_numpy(array, **options)
        made.append(each)
    return made


def pair(first: int = 0, dtype: Any = np.int32, rows: int = 1) -> dict[str, Array]:
    """Both inputs of `simple` and its kin."""
    counted = np.arange(first, first + 16 * rows).reshape(rows, 16)
    return {"INPUT0": counted.astype(dtype), "INPUT1": np.ones_like(counted).astype(dtype)}


def texts(values: Iterable[str | bytes], *shape: int) -> Array:
    """BYTES of text or bytes."""
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    array = np.empty(len(encoded), dtype=np.object_)
    array[:] = encoded
    return array.reshape(shape or (len(encoded),))


def check_sums(result: Any, tensors: Mapping[str, Array]) -> None:
    """An answer of `simple` is right."""
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), tensors["INPUT0"] + tensors["INPUT1"])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), tensors["INPUT0"] - tensors["INPUT1"])


def as_numbers(value: Any) -> Any:
    """Protobuf's JSON with its 64-bit integers as numbers again; versions stay text."""
    if isinstance(value, dict):
        return {key: each if key in {"version", "name"} else as_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_numbers(each) for each in value]
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def post(
    server: ServerProcess, path: str, body: bytes | Iterable[bytes], **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A POST as bytes: status, headers by lower-case name, body. Underscores of header names become hyphens."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def post_json(server: ServerProcess, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """A POST of JSON that is answered with JSON."""
    status, _, answer = post(server, path, msgspec.json.encode(body), **headers)
    return status, msgspec.json.decode(answer)


def pending(server: ServerProcess, model: str) -> float:
    """Requests of a model that have no answer yet."""
    return nv(server, "nv_inference_pending_request_count", model)


def nv(server: ServerProcess, name: str, model: str, **labels: str) -> float:
    """Sum of the samples of a metric of one model, with these labels."""
    wanted = {"model": model, **labels}
    total = 0.0
    for line in server.request("GET", "/metrics")[1].splitlines():
        if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in wanted.items()):
            total += float(line.rpartition(" ")[2])
    return total


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, within half a minute."""

    async def bounded() -> Any:
        return await asyncio.wait_for(coroutine, 30)

    return asyncio.run(bounded())
