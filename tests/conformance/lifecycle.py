"""What the tests of models' lives share: models that tell their versions apart, and repositories that are changed."""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper
from tests.conformance.process import ServerProcess
from tests.conformance.triton import Caller
from tests.tiny_tensors import config_text, graph, slow, write_model

T = TypeVar("T")

A_WHILE = 150_000
"""Turns of `slow`: some 0.1 s of an idle core."""
ALL_VERSIONS = "version_policy { all { } }"
ONE_AT_A_TIME = "dynamic_batching { }\ninstance_group { count: 1 }"


def plus(number: int) -> onnx.ModelProto:
    """OUTPUT0 = INPUT0 + number, INT32 [1]."""
    node = helper.make_node("Add", ["INPUT0", "number"], ["OUTPUT0"])
    constant = helper.make_tensor("number", TensorProto.INT32, [1], [number])
    return graph([node], [("INPUT0", "INT32", (1,))], [("OUTPUT0", "INT32", (1,))], constants=[constant])


def plus_slowly(number: int) -> onnx.ModelProto:
    """As `plus`, with an input TURNS (INT64 [1]) for which `slow` turns first."""
    model = slow()
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.name = {"INPUT": "TURNS", "OUTPUT": "TURNED"}[tensor.name]
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"INPUT": "TURNS", "OUTPUT": "TURNED"}.get(name, name) for name in names]
    added = plus(number).graph
    model.graph.node.extend(added.node)
    model.graph.input.extend(added.input)
    model.graph.output.extend(added.output)
    model.graph.initializer.extend(added.initializer)
    return model


def write_slow_to_load(root: Path, name: str, number: int, *, version: int, seconds: float) -> None:
    """A version whose warm-up takes about so long, and longer on a busy machine."""
    turns = np.array([A_WHILE], np.int64)
    warm_up = (
        f'model_warmup {{ name: "w" batch_size: 1 count: {max(1, round(seconds / 0.1))} '
        'inputs { key: "TURNS" value { data_type: TYPE_INT64 dims: [ 1 ] input_data_file: "turns" } } '
        'inputs { key: "INPUT0" value { data_type: TYPE_INT32 dims: [ 1 ] zero_data: true } } }'
    )
    files = {"warmup/turns": turns.tobytes()}
    write_model(root, name, plus_slowly(number), version=version, config=config_text(rest=warm_up), files=files)


def ensemble(*parts: str) -> str:
    """The config of an ensemble of `plus` models in a row."""
    steps = [
        f'step {{ model_name: "{part}" model_version: -1 '
        f'input_map {{ key: "INPUT0" value: "{"INPUT0" if number == 0 else f"t{number}"}" }} '
        f'output_map {{ key: "OUTPUT0" value: "{"OUTPUT0" if number == len(parts) - 1 else f"t{number + 1}"}" }} }}'
        for number, part in enumerate(parts)
    ]
    ports = " ".join(
        f'{field} {{ name: "{name}" data_type: TYPE_INT32 dims: [ 1 ] }}'
        for field, name in (("input", "INPUT0"), ("output", "OUTPUT0"))
    )
    return f'platform: "ensemble" max_batch_size: 8 {ports} ensemble_scheduling {{ {" ".join(steps)} }}'


def write_ensemble(root: Path, name: str, *parts: str) -> None:
    (root / name / "1").mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(ensemble(*parts))


def place(root: Path, name: str, write: Callable[[Path], object]) -> None:
    """Write a model beside the repository and rename it to its place; one that is there is replaced."""
    beside = root.parent / f"{root.name}-beside"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write(beside)
    if (root / name).exists():
        (root / name).rename(beside / "old")
    (beside / name).rename(root / name)


def answer(caller: Caller, model: str, version: str = "", *, turns: int | None = None) -> int:
    """What a model of `plus` makes of 0."""
    tensors = {"INPUT0": np.zeros((1, 1), np.int32)}
    if turns is not None:
        tensors["TURNS"] = np.full((1, 1), turns, np.int64)  # type: ignore[assignment]
    return int(caller.infer(model, tensors, model_version=version).as_numpy("OUTPUT0")[0, 0])


def turn(caller: Caller, model: str, turns: int, **options: object) -> int:
    """What `slow` answers."""
    result = caller.infer(model, {"INPUT": np.full((1, 1), turns, np.int64)}, **options)
    return int(result.as_numpy("OUTPUT")[0, 0])


def rows(caller: Caller, name: str) -> list[tuple[str, ...]]:
    """A model's rows of the index: version, state and reason, without what is empty."""
    shown = caller.show("get_model_repository_index")
    every = shown if caller.protocol == "http" else shown.get("models", [])
    return [
        tuple(filter(None, (row.get("version"), row.get("state"), row.get("reason"))))
        for row in every
        if row["name"] == name
    ]


class Callers:
    """Clients in threads: each call has a client of its own, closed when it has returned."""

    def __init__(self, server: ServerProcess, num_threads: int) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(num_threads)

    def __enter__(self) -> "Callers":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def call(self, protocol: str, work: Callable[[Caller], T]) -> "Future[T]":
        def with_client() -> T:
            with Caller(protocol, self._server, **({"network_timeout": 60} if protocol == "http" else {})) as caller:
                return work(caller)

        return self._pool.submit(with_client)
