"""Loading of tensor models: what a config asks for, and files that nobody should trust."""

import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper, numpy_helper
from tests import tiny_tensors
from tests.serving.tensor_serving import (
    of_sequence,
    one,
    pair,
    run,
    tensor_model,
    values,
    write_add_sub,
    write_identity,
)

from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.repository.layout import Repository
from sardonyx.serving.loader import ModelLoader
from sardonyx.serving.memory import KvBudget
from sardonyx.serving.registry import Registry
from sardonyx.settings import Settings


def make_loader(root: Path, **options: Any) -> ModelLoader:
    settings = Settings(repository=root, num_threads=1, **options)
    return ModelLoader([Repository(root)], settings, Metrics("test"), KvBudget(1 << 20))


def refuse(root: Path, match: str, name: str = "m") -> ConfigError:
    """Loading fails, and leaves neither threads nor open files."""
    loader = make_loader(root)
    process = psutil.Process()
    before = threading.active_count(), process.num_fds()
    with pytest.raises(ConfigError, match=match) as refusal:
        loader.load(name)
    assert (threading.active_count(), process.num_fds()) == before
    loader.close()
    return refusal.value


def reason_of(registry: Registry, name: str = "m") -> str:
    (row,) = [row for row in registry.version_index() if row.name == name]
    assert row.state == "UNAVAILABLE"
    return row.reason


# Configs --------------------------------------------------------------------------------------------------------------


def test_config_is_completed_from_the_graph(tmp_path: Path) -> None:
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub())

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        assert (model.config.max_batch_size, model.config.backend) == (4, "onnxruntime")
        assert model.config.HasField("dynamic_batching")
        assert [(each.name, each.datatype, each.shape) for each in model.inputs] == [
            ("INPUT0", "INT32", (-1, 16)),
            ("INPUT1", "INT32", (-1, 16)),
        ]
        a = [list(range(16))] * 4
        answer = await model.infer(pair(a, a, outputs=["OUTPUT1"]))
        assert values(answer) == {"OUTPUT1": [[0] * 16] * 4}

    run(tmp_path, test)


def test_without_completion_a_config_must_say_it_all(tmp_path: Path) -> None:
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub())

    async def test(registry: Registry) -> None:
        assert "must specify 'output' for m" in reason_of(registry)

    run(tmp_path, test, auto_complete_config=False)


def test_graph_may_lie_in_a_folder_with_its_data(tmp_path: Path) -> None:
    (tmp_path / "m/1/model.onnx").mkdir(parents=True)
    data = tiny_tensors.serialize(tiny_tensors.identity())
    (tmp_path / "m/1/model.onnx/model.onnx").write_bytes(data)

    async def test(registry: Registry) -> None:
        assert values(await tensor_model(registry).infer(one([[1.0]], "FP32"))) == {"OUTPUT0": [[1.0]]}
        assert tensor_model(registry).size_bytes == len(data)

    run(tmp_path, test)


def test_file_may_have_the_name_that_the_config_says(tmp_path: Path) -> None:
    write_identity(tmp_path, rest='default_model_filename: "net.onnx"')
    (tmp_path / "m/1/model.onnx").rename(tmp_path / "m/1/net.onnx")

    async def test(registry: Registry) -> None:
        assert values(await tensor_model(registry).infer(one())) == {"OUTPUT0": [[1]]}

    run(tmp_path, test)


def test_missing_graph_is_told_in_tritons_words(tmp_path: Path) -> None:
    write_identity(tmp_path)
    (tmp_path / "m/1/model.onnx").unlink()
    refuse(tmp_path, "unable to find 'model.onnx' for model instance 'm'")


def test_config_that_contradicts_the_graph_leaves_nothing_open(tmp_path: Path) -> None:
    write_add_sub(tmp_path)
    write_identity(tmp_path, "other", datatype="FP32")
    (tmp_path / "m/config.pbtxt").write_text((tmp_path / "other/config.pbtxt").read_text())
    refuse(tmp_path, "configuration expects 1 inputs, model provides 2")


def test_operators_session_options_reach_the_session(tmp_path: Path) -> None:
    parameters = {
        "intra_op_thread_count": "3",
        "execution_mode": "1",
        "inter_op_thread_count": "2",
        "enable_mem_arena": "0",
    }
    rest = "\n".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()
    )
    write_identity(tmp_path, rest=f"{rest}\noptimization {{ graph {{ level: -1 }} }}")

    async def test(registry: Registry) -> None:
        session = tensor_model(registry)._engine._runner._sessions[0]  # type: ignore[attr-defined]
        options = session._open().get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 2)
        assert (options.execution_mode.name, options.enable_cpu_mem_arena) == ("ORT_PARALLEL", False)
        assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"

    run(tmp_path, test)


def test_time_of_the_load_is_kept_and_notes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_identity(tmp_path, rest='runtime: "libtriton.so"')

    async def test(registry: Registry) -> None:
        assert tensor_model(registry).statistics.load_s > 0

    with caplog.at_level(logging.INFO, "sardonyx"):
        run(tmp_path, test)
    assert "m: runtime 'libtriton.so' changes nothing" in caplog.text


# Labels ---------------------------------------------------------------------------------------------------------------

LABELS = 'output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ -1 ] label_filename: "labels.txt" } ]'


def write_labelled(root: Path, labels: str | bytes | None) -> Path:
    config = tiny_tensors.config_text(inputs=[("INPUT0", "FP32", (-1,))], rest=LABELS)
    files = {} if labels is None else {"labels.txt": labels}
    return tiny_tensors.write_model(root, "m", tiny_tensors.identity(), config=config, files=files)


def test_labels_are_lines_of_a_file(tmp_path: Path) -> None:
    write_labelled(tmp_path, "cat\ndög\r\n\nbird")

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        assert model.labels("OUTPUT0") == ["cat", "dög", "", "bird"]
        assert model.labels("nothing") == []

    run(tmp_path, test)


def test_labels_that_are_missing_leave_no_threads_behind(tmp_path: Path) -> None:
    write_labelled(tmp_path, None)
    refuse(tmp_path, "labels.txt: cannot be read: No such file or directory")


def test_labels_outside_of_the_models_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    folder = write_labelled(tmp_path, None)
    (folder / "labels.txt").symlink_to(tmp_path / "secret")
    refuse(tmp_path, "is a link that leads out of the model's folder")


def test_pipe_in_place_of_labels_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(write_labelled(tmp_path, None) / "labels.txt")
    refuse(tmp_path, "labels.txt: is not a regular file")


def test_labels_without_end_are_refused(tmp_path: Path) -> None:
    folder = write_labelled(tmp_path, None)
    with (folder / "labels.txt").open("wb") as file:
        file.truncate(1 << 40)
    refuse(tmp_path, "labels.txt: is larger than 16,777,216 bytes")


# Warm-up --------------------------------------------------------------------------------------------------------------


def warm_up(datatype: str, data: str, *, dims: str = "3", batch_size: int = 2, count: int = 1) -> str:
    kind = "STRING" if datatype == "BYTES" else datatype
    return (
        f'model_warmup {{ name: "w" batch_size: {batch_size} count: {count} inputs {{ key: "INPUT0" value '
        f"{{ data_type: TYPE_{kind} dims: [ {dims} ] {data} }} }} }}"
    )


@pytest.mark.parametrize("data", ["zero_data: true", "random_data: true"])
@pytest.mark.parametrize("datatype", tiny_tensors.DATATYPES)
def test_every_datatype_is_warmed_up(tmp_path: Path, datatype: str, data: str) -> None:
    write_identity(tmp_path, datatype=datatype, rest=warm_up(datatype, data))

    async def test(registry: Registry) -> None:
        assert tensor_model(registry).statistics.execution_count == 0  # nobody's request

    run(tmp_path, test)


def gather() -> onnx.ModelProto:
    """Fails for an INPUT0 other than 7, so that a warm-up shows what it ran with."""
    table = numpy_helper.from_array(np.zeros(1, np.float32), "table")
    seven = numpy_helper.from_array(np.array(7, np.int64), "seven")
    nodes = [
        helper.make_node("Sub", ["INPUT0", "seven"], ["index"]),
        helper.make_node("Mul", ["index", "seven"], ["far"]),
        helper.make_node("Gather", ["table", "far"], ["OUTPUT0"]),
    ]
    ports = [("INPUT0", "INT64", (3,))], [("OUTPUT0", "FP32", (3,))]
    return tiny_tensors.graph(nodes, *ports, constants=[table, seven])


def write_gather(root: Path, rest: str, files: dict[str, str | bytes] | None = None) -> Path:
    config = tiny_tensors.config_text(
        inputs=[("INPUT0", "INT64", (3,))], outputs=[("OUTPUT0", "FP32", (3,))], rest=rest
    )
    return tiny_tensors.write_model(root, "m", gather(), config=config, files=files)


def test_warm_up_runs_on_the_data_of_a_file(tmp_path: Path) -> None:
    rest = warm_up("INT64", 'input_data_file: "w"')
    write_gather(tmp_path, rest, {"warmup/w": np.full(3, 7, np.int64).tobytes()})
    model = make_loader(tmp_path).load("m")
    asyncio.run(model.newest.close())
    (tmp_path / "m/warmup/w").write_bytes(np.full(3, 8, np.int64).tobytes())
    refuse(tmp_path, "model_warmup: warm-up sample 'w' failed: model m failed")


@pytest.mark.parametrize("size", [0, 23, 25])
def test_warm_up_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    write_gather(tmp_path, warm_up("INT64", 'input_data_file: "w"'), {"warmup/w": bytes(size)})
    refuse(tmp_path, "w: (holds [0-9]+ bytes, 24 are needed|is larger than 24 bytes)")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x01\0\0\0a\x02\0\0\0bc\0\0\0\0", None),
        (b"\x01\0\0\0a", "holds 1 strings, 3 are needed"),
        (b"\x01\0\0\0a\x02\0\0\0b", "ends inside a string"),
        (b"\x01\0\0\0a\0\0", "ends inside a string"),
        (b"\xff\xff\xff\xff", "ends inside a string"),
        (b"", "holds 0 strings"),
    ],
)
def test_strings_of_a_warm_up_file_have_their_lengths_in_front(tmp_path: Path, data: bytes, match: str | None) -> None:
    rest = warm_up("BYTES", 'input_data_file: "w"')
    write_identity(tmp_path, datatype="BYTES", rest=rest, files={"warmup/w": data})
    if match is not None:
        refuse(tmp_path, match)
        return
    asyncio.run(make_loader(tmp_path).load("m").newest.close())


def test_warm_up_folder_that_leads_elsewhere_is_not_read(tmp_path: Path) -> None:
    folder = write_gather(tmp_path, warm_up("INT64", 'input_data_file: "w"'))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/w").write_bytes(bytes(24))
    (folder / "warmup").symlink_to(tmp_path / "elsewhere")
    refuse(tmp_path, "is a link that leads out of the model's folder")


# States ---------------------------------------------------------------------------------------------------------------


def write_stateful(root: Path, initial: str, *, dims: str = "2", rest: str = "", files: Any = None) -> None:
    """OUTPUT0 = INPUT0 + STATE, and the next STATE."""
    nodes = [
        helper.make_node("Add", ["INPUT0", "STATE"], ["OUTPUT0"]),
        helper.make_node("Identity", ["OUTPUT0"], ["STATE_OUT"]),
    ]
    names = ("INPUT0", "STATE"), ("OUTPUT0", "STATE_OUT")
    model = tiny_tensors.graph(nodes, *([(name, "INT32", (None,)) for name in side] for side in names))
    text = f"""
    sequence_batching {{ state {{
      input_name: "STATE" output_name: "STATE_OUT" data_type: TYPE_INT32 dims: [ {dims} ] {initial}
    }} }}
    {rest}"""
    config = tiny_tensors.config_text(
        max_batch_size=4, inputs=[("INPUT0", "INT32", (-1,))], outputs=[("OUTPUT0", "INT32", (-1,))], rest=text
    )
    tiny_tensors.write_model(root, "m", model, config=config, files=files)


FILE_STATE = 'initial_state { name: "s" data_type: TYPE_INT32 dims: [ 2 ] data_file: "s" }'


@pytest.mark.parametrize(("initial", "first"), [("", [1, 1]), (FILE_STATE, [8, 9])])
def test_sequences_begin_with_zeros_or_with_a_files_state(tmp_path: Path, initial: str, first: list[int]) -> None:
    write_stateful(tmp_path, initial, files={"initial_state/s": np.array([7, 8], np.int32).tobytes()})

    async def test(registry: Registry) -> None:
        model = tensor_model(registry)
        assert values(await model.infer(of_sequence([[1, 1]], 3, start=True))) == {"OUTPUT0": [first]}
        assert values(await model.infer(of_sequence([[1, 1]], 3))) == {"OUTPUT0": [[each + 1 for each in first]]}
        assert values(await model.infer(of_sequence([[1, 1]], 3, start=True))) == {"OUTPUT0": [first]}

    run(tmp_path, test)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_state_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    write_stateful(tmp_path, FILE_STATE, files={"initial_state/s": bytes(size)})
    refuse(tmp_path, "s: (holds [0-9]+ bytes, 8 are needed|is larger than 8 bytes)")


def test_state_folder_that_leads_elsewhere_is_not_read(tmp_path: Path) -> None:
    write_stateful(tmp_path, FILE_STATE)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/s").write_bytes(bytes(8))
    (tmp_path / "m/initial_state").symlink_to(tmp_path / "elsewhere")
    refuse(tmp_path, "is a link that leads out of the model's folder")


@pytest.mark.parametrize("source", ["zero_data: true", 'data_file: "s"'])
def test_state_that_no_memory_holds_is_refused(tmp_path: Path, source: str) -> None:
    initial = f'initial_state {{ name: "s" data_type: TYPE_INT32 dims: [ {1 << 40} ] {source} }}'
    write_stateful(tmp_path, initial, dims="-1", files={"initial_state/s": b""})
    refuse(tmp_path, "initial state of 'STATE' has more than 268,435,456 elements")


def test_rows_of_a_stateful_models_warm_up_are_sequences_of_their_own(tmp_path: Path) -> None:
    write_stateful(tmp_path, "", rest=warm_up("INT32", "zero_data: true", dims="2", batch_size=3, count=2))
    asyncio.run(make_loader(tmp_path).load("m").newest.close())


# Files that nobody should trust ---------------------------------------------------------------------------------------


def load_all(root: Path) -> dict[str, str]:
    """Load every model beside a sound one, which must serve in the end; why the others are UNAVAILABLE."""
    write_identity(root, "sound")
    reasons: dict[str, str] = {}

    async def main(registry: Registry) -> None:
        reasons.update((row.name, row.reason) for row in registry.version_index() if row.state == "UNAVAILABLE")
        assert values(await registry.served("sound").infer(one())) == {"OUTPUT0": [[1]]}
        for reason in reasons.values():
            assert reason
            assert str(root) not in reason

    run(root, main)
    return reasons


def test_cut_off_files_are_unavailable(tmp_path: Path) -> None:
    data = tiny_tensors.serialize(tiny_tensors.slow())
    for quarter in range(1, 4):
        tiny_tensors.write_model(tmp_path, f"q{quarter}", data[: quarter * len(data) // 4])
    tiny_tensors.write_model(tmp_path, "last", data[:-1])
    assert load_all(tmp_path).keys() == {"q1", "q2", "q3", "last"}


@pytest.mark.parametrize("data", [b"", b"\0", b"\x08", b"\xff" * 64, b"{}", b"\x0a" * 1000, bytes(1 << 16)])
def test_files_that_are_no_graphs_are_unavailable(tmp_path: Path, data: bytes) -> None:
    tiny_tensors.write_model(tmp_path, "bad", data)
    assert load_all(tmp_path).keys() == {"bad"}


def test_random_bytes_are_unavailable(tmp_path: Path) -> None:
    source = random.Random(1)
    for number in range(40):
        tiny_tensors.write_model(tmp_path, f"r{number}", source.randbytes(source.randrange(1, 2000)))
    assert len(load_all(tmp_path)) == 40


def test_files_with_flipped_bits_load_or_are_unavailable(tmp_path: Path) -> None:
    source = random.Random(2)
    models = [tiny_tensors.serialize(each) for each in (tiny_tensors.slow(), tiny_tensors.add_sub("BYTES"))]
    for number in range(150):
        data = bytearray(source.choice(models))
        for _ in range(source.choice((1, 1, 2, 8))):
            data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        tiny_tensors.write_model(tmp_path, f"b{number}", bytes(data))
    assert load_all(tmp_path)


def with_initializer(dims: list[int], datatype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A weight of that shape without data."""
    weight = onnx.TensorProto(name="big", data_type=datatype, dims=dims)
    nodes = [
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["INPUT0", "sum"], ["OUTPUT0"]),
    ]
    port = ("FP32", (1,))
    return tiny_tensors.graph(nodes, [("INPUT0", *port)], [("OUTPUT0", *port)], constants=[weight])


def test_a_type_that_only_caches_have_is_refused(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info("INPUT0", onnx.TensorProto.FLOAT8E4M3FN, [1])]
    results = [helper.make_tensor_value_info("OUTPUT0", onnx.TensorProto.FLOAT, [1])]
    node = helper.make_node("Cast", ["INPUT0"], ["OUTPUT0"], to=onnx.TensorProto.FLOAT)
    graph = helper.make_graph([node], "cast", ports, results)
    opsets = [helper.make_opsetid("", 21)]
    tiny_tensors.write_model(tmp_path, "m", helper.make_model(graph, opset_imports=opsets, ir_version=10))
    refuse(tmp_path, r"INPUT0: type tensor\(float8e4m3fn\) cannot be served")


@pytest.mark.parametrize("dims", [[1 << 20], [1 << 33], [1 << 62], [1 << 40, 1 << 40], [-5]])
def test_weights_that_are_promised_and_not_there_are_refused(tmp_path: Path, dims: list[int]) -> None:
    tiny_tensors.write_model(tmp_path, "m", with_initializer(dims))
    before = psutil.Process().memory_info().rss
    refuse(tmp_path, r"model\.onnx: ONNX Runtime .* cannot open it")
    assert psutil.Process().memory_info().rss - before < 64 << 20


def constant(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


@pytest.mark.parametrize("exponent", [24, 33, 40])
@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Tile"])
def test_huge_constants_are_not_made_while_a_model_loads(tmp_path: Path, operator: str, exponent: int) -> None:
    inputs = ["shape"] if operator == "ConstantOfShape" else ["one", "shape"]
    nodes = [
        helper.make_node(operator, inputs, ["big"]),
        helper.make_node("ReduceMax", ["big"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["number"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Add", ["INPUT0", "number"], ["OUTPUT0"]),
    ]
    port = ("FP32", (1,))
    constants = [constant("shape", 1 << exponent), constant("one", 1)]
    model = tiny_tensors.graph(nodes, [("INPUT0", *port)], [("OUTPUT0", *port)], constants=constants)
    config = tiny_tensors.config_text()
    tiny_tensors.write_model(tmp_path, "m", model, config=config)
    loader = make_loader(tmp_path)
    before = psutil.Process().memory_info().rss
    with contextlib.suppress(ConfigError):
        asyncio.run(loader.load("m").newest.close())
    assert psutil.Process().memory_info().rss - before < 300 << 20


def nested(depth: int) -> bytes:
    """An If within an If and so on, on the wire: the onnx package would refuse to write it."""

    def field(number: int, payload: bytes) -> bytes:
        head, size = number << 3 | 2, len(payload)
        coded = bytearray([head])
        while size >= 0x80:
            coded.append(size & 0x7F | 0x80)
            size >>= 7
        return bytes(coded) + bytes([size]) + payload

    graph = b""
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute))
    return b"\x08\x08" + field(7, graph)


@pytest.mark.parametrize("depth", [20, 40, 1000, 20_000])
def test_branches_within_branches_are_refused(tmp_path: Path, depth: int) -> None:
    tiny_tensors.write_model(tmp_path, "m", nested(depth))
    refuse(tmp_path, r"model\.onnx: ")


def outside(location: str) -> onnx.ModelProto:
    model = with_initializer([4])
    weight = model.graph.initializer[0]
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    weight.external_data.add(key="length", value="16")
    return model


@pytest.mark.parametrize("location", ["../../secret", "/etc/passwd", "a/../../../secret", ""])
def test_weights_outside_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    tiny_tensors.write_model(tmp_path, "m", outside(location))
    refuse(tmp_path, "is not a plain path inside the model's folder")


@pytest.mark.parametrize("link", ["symbolic", "hard", "folder"])
def test_weights_behind_a_link_are_refused(tmp_path: Path, link: str) -> None:
    secret = tmp_path / "elsewhere/secret"
    secret.parent.mkdir()
    secret.write_bytes(bytes(16))
    folder = tiny_tensors.write_model(tmp_path, "m", outside("f/secret" if link == "folder" else "secret")) / "1"
    if link == "folder":
        (folder / "f").symlink_to(secret.parent)
    elif link == "hard":
        os.link(secret, folder / "secret")
    else:
        (folder / "secret").symlink_to(secret)
    refuse(tmp_path, "external data '(f/)?secret' (cannot be opened inside the model's folder|has 2 hard links)")


def test_graph_behind_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write_identity(tmp_path, "other")
    write_identity(tmp_path)
    (tmp_path / "m/1/model.onnx").unlink()
    (tmp_path / "m/1/model.onnx").symlink_to(tmp_path / "other/1/model.onnx")
    refuse(tmp_path, "is a link that leads out of the model's folder")


def test_model_that_takes_more_memory_than_there_is_fails_its_call_and_the_process_lives(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["INPUT0"], ["sizes"], to=onnx.TensorProto.INT64),
        helper.make_node("Reshape", ["sizes", "flat"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["INPUT0", "sum"], ["OUTPUT0"]),
    ]
    port = ("FP32", (1,))
    model = tiny_tensors.graph(nodes, [("INPUT0", *port)], [("OUTPUT0", *port)], constants=[constant("flat", -1)])
    tiny_tensors.write_model(tmp_path, "m", model)
    # In a process of its own: what is asked for is more than the machine may have.
    script = f"""
import asyncio, resource
from pathlib import Path
from tests.serving.tensor_serving import one, run, values
from sardonyx.errors import EngineError

async def test(registry):
    model = registry.served("m")
    try:
        await model.infer(one([[2.0**36]], "FP32"))
    except EngineError as error:
        print(error.message)
    print(values(await model.infer(one([[2.0]], "FP32"))))

resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
run(Path({str(tmp_path)!r}), test)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": f"{root}:{root / 'server'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.splitlines() == [
        "model m failed on the execution provider cpu",
        "{'OUTPUT0': [[0.0]]}",
    ], ended.stderr
