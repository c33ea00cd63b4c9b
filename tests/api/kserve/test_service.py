"""The protocol without a transport, over real models."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tests import tiny_tensors
from tests.serving import tensor_serving
from tests.serving.tensor_serving import tensor, write_add_sub, write_identity
from tests.tiny_models import make_language_model

from sardonyx.api.kserve.calls import (
    IndexRow,
    LogSettings,
    RegionSlice,
    SharedInput,
    SharedOutput,
    TraceSettings,
    WantedOutput,
    WireReply,
    WireRequest,
)
from sardonyx.api.kserve.service import InferenceService
from sardonyx.api.kserve.shared_memory import SharedMemory
from sardonyx.errors import (
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    PayloadTooLarge,
    PermissionDenied,
    UnsupportedFeature,
)
from sardonyx.serving.registry import Registry
from sardonyx.settings import Settings
from sardonyx.tensors import Tensor

SIZE = 256


def run(root: Path, test: Callable[[InferenceService], Awaitable[None]], **options: Any) -> None:
    settings = Settings(repository=root, **options)
    memory = SharedMemory(root)

    async def main(registry: Registry) -> None:
        service = InferenceService(registry, settings, memory)
        try:
            await test(service)
        finally:
            service.close()

    tensor_serving.run(root, main, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two versions of a model that adds and subtracts, and one that does not load."""
    write_add_sub(tmp_path, rest="version_policy { all { } }")
    write_add_sub(tmp_path, rest="version_policy { all { } }")
    tiny_tensors.write_model(tmp_path, "m", tiny_tensors.add_sub(shape=(1,)), version=3)
    tiny_tensors.write_model(tmp_path, "broken", tiny_tensors.unknown_operator())
    (tmp_path / "shm").write_bytes(bytes(SIZE))
    return tmp_path


def asked(*, name: str = "m", version: str = "", **options: Any) -> WireRequest:
    inputs = [tensor("INPUT0", [[7]]), tensor("INPUT1", [[2]])]
    return WireRequest(**({"model_name": name, "model_version": version, "inputs": inputs} | options))


def values(reply: WireReply) -> dict[str, Any]:
    assert all(isinstance(each, Tensor) for each in reply.outputs)
    return {each.name: each.array.tolist() for each in reply.outputs}  # type: ignore[union-attr]


# Models ---------------------------------------------------------------------------------------------------------------


def test_highest_version_answers_where_none_is_named(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        reply = await service.infer(asked(id="x"))
        assert (reply.model_name, reply.model_version, reply.id, reply.is_final) == ("m", "3", "x", True)
        assert values(reply) == {"OUTPUT0": [[9]], "OUTPUT1": [[5]]}
        assert (await service.infer(asked(version="1"))).model_version == "1"
        assert service.ready_versions("m") == [1, 3]
        assert service.config("m", "1").name == "m"

    run(root, test)


def test_unknown_models_and_versions_are_told_in_tritons_words(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        with pytest.raises(ModelNotFound, match=r"^Request for unknown model: 'x' is not found$"):
            await service.infer(asked(name="x"))
        with pytest.raises(ModelNotFound, match=r"^Request for unknown model: 'm' version 2 is not found$"):
            await service.infer(asked(version="2"))
        with pytest.raises(ModelNotReady, match="Request for unknown model: 'broken' has no available versions: "):
            await service.infer(asked(name="broken"))

    run(root, test)


@pytest.mark.parametrize("version", ["0", "-1", "1.0", "x", "1 ", "9" * 19, "\uff11"])
def test_versions_are_numbers_from_one(root: Path, version: str) -> None:
    async def test(service: InferenceService) -> None:
        for use in (service.model, service.is_model_ready, service.config):
            with pytest.raises(InvalidRequest, match="failed to get model version from specified version string"):
                use("m", version)

    run(root, test)


def test_readiness_of_what_is_not_there_is_no_error(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        named = [("m", ""), ("m", "1"), ("m", "2"), ("broken", ""), ("x", "")]
        assert [service.is_model_ready(*each) for each in named] == [True, True, False, False, False]
        assert service.is_live()
        assert not service.is_ready()  # broken is not

    run(root, test)
    run(root, _is_ready, strict_readiness=False)


async def _is_ready(service: InferenceService) -> None:
    assert service.is_ready()


def test_statistics_are_of_one_version_of_all_or_of_all_models(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        await service.infer(asked(version="1"))
        assert [(each.version, each.success.count) for each in service.statistics("m")] == [(1, 1), (3, 0)]
        assert [each.success.count for each in service.statistics("m", "1")] == [1]
        assert [(each.name, each.version) for each in service.statistics()] == [("m", 1), ("m", 3)]
        for name, version in (("x", ""), ("m", "2"), ("broken", "")):
            with pytest.raises(InvalidRequest, match=f"^requested model '{name}.*' is not available$"):
                service.statistics(name, version)

    run(root, test)


def test_index_has_a_row_for_each_version(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        rows = await service.index()
        assert rows[1:] == [IndexRow(name="m", version=version, state="READY") for version in ("1", "3")]
        assert (rows[0].name, rows[0].state) == ("broken", "UNAVAILABLE")
        assert "cannot open it" in rows[0].reason
        assert await service.index(ready=True) == rows[1:]

    run(root, test)


def test_server_tells_what_it_is(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        assert service.server_name == "triton"
        assert service.server_version
        assert "system_shared_memory" not in service.extensions

    async def with_memory(service: InferenceService) -> None:
        assert "system_shared_memory" in service.extensions

    run(root, test, id="triton")
    run(root, with_memory, allow_client_shm=True)


# Inference ------------------------------------------------------------------------------------------------------------


def test_wanted_outputs_come_in_their_order(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        wanted = [WantedOutput(name="OUTPUT1"), WantedOutput(name="OUTPUT0")]
        assert list(values(await service.infer(asked(outputs=wanted)))) == ["OUTPUT1", "OUTPUT0"]
        with pytest.raises(InvalidRequest, match="unexpected inference output 'X' for model 'm'"):
            await service.infer(asked(outputs=[WantedOutput(name="X")]))

    run(root, test)


def test_parameters_of_the_protocol_are_checked(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        reply = await service.infer(asked(parameters={"priority": 1, "timeout": 5, "sequence_id": "a", "mine": 1.5}))
        assert values(reply)["OUTPUT0"] == [[9]]
        with pytest.raises(InvalidRequest, match=r"^priority: "):
            await service.infer(asked(parameters={"priority": -1}))
        with pytest.raises(InvalidRequest, match="parameter keys starting with 'triton_' are reserved"):
            await service.infer(asked(parameters={"triton_x": 1}))

    run(root, test)


def test_sequence_of_the_parameters_reaches_the_model(tmp_path: Path) -> None:
    control = 'control_input { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }'
    ports = [("INPUT0", "INT32", (1,)), ("ID", "BYTES", (1,))]
    nodes = [helper.make_node("Identity", [source], [target]) for source, target in (("INPUT0", "X"), ("ID", "TOLD"))]
    model = tiny_tensors.graph(nodes, ports, [("X", "INT32", (1,)), ("TOLD", "BYTES", (1,))])
    config = tiny_tensors.config_text(
        inputs=[("INPUT0", "INT32", (1,))],
        outputs=[("TOLD", "BYTES", (1,))],
        rest=f"sequence_batching {{ {control} }}",
    )
    tiny_tensors.write_model(tmp_path, "m", model, config=config)

    async def test(service: InferenceService) -> None:
        inputs = [tensor("INPUT0", [[1]])]
        started = {"sequence_id": "user-1", "sequence_start": True}
        assert values(await service.infer(asked(inputs=inputs, parameters=started))) == {"TOLD": [[b"user-1"]]}
        with pytest.raises(InvalidRequest, match="sequence_id of model 'm' must be a string"):
            await service.infer(asked(inputs=inputs, parameters={"sequence_id": 5, "sequence_start": True}))
        with pytest.raises(InvalidRequest, match="must specify the START flag"):
            await service.infer(asked(inputs=inputs, parameters={"sequence_id": "user-2"}))
        with pytest.raises(InvalidRequest, match="non-zero or non-empty correlation ID"):
            await service.infer(asked(inputs=inputs, parameters={"sequence_id": ""}))

    run(tmp_path, test)


def test_stream_has_every_answer_and_closing_it_aborts(tmp_path: Path) -> None:
    make_language_model(tmp_path, "llm")

    async def test(service: InferenceService) -> None:
        prompt = [tensor("text_input", ["the cat"], "BYTES")]
        parameters = {"stream": True, "max_tokens": 150, "temperature": 0.0, "ignore_eos": True}
        request = WireRequest(model_name="llm", id="7", inputs=prompt, parameters=parameters)
        replies = [each async for each in service.stream(request)]
        assert len(replies) > 1
        assert {(each.model_name, each.model_version, each.id) for each in replies} == {("llm", "1", "7")}
        assert [each.is_final for each in replies] == [False] * (len(replies) - 1) + [True]
        left = service.stream(request)
        await anext(left)
        await left.aclose()  # type: ignore[attr-defined]
        (statistics,) = service.statistics("llm")
        assert (statistics.num_pending, statistics.failures) == (0, {"CANCELED": 1})

    run(tmp_path, test, kv_cache_bytes=1 << 24)


# Classification -------------------------------------------------------------------------------------------------------


def write_labelled(root: Path, max_batch_size: int = 4) -> None:
    rest = 'output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 3 ] label_filename: "labels.txt" } ]'
    config = tiny_tensors.config_text(max_batch_size=max_batch_size, inputs=[("INPUT0", "FP32", (3,))], rest=rest)
    model = tiny_tensors.identity(shape=(3,), is_batched=max_batch_size > 0)
    tiny_tensors.write_model(root, "m", model, config=config, files={"labels.txt": "cat\ndog"})


def test_classes_come_in_place_of_values_where_they_are_wanted(tmp_path: Path) -> None:
    write_labelled(tmp_path)

    async def test(service: InferenceService) -> None:
        request = asked(
            inputs=[tensor("INPUT0", [[1, 3, 3], [0.5, 0, 9]], "FP32")],
            outputs=[WantedOutput(name="OUTPUT0", num_classes=2)],
        )
        assert values(await service.infer(request)) == {
            "OUTPUT0": [[b"3.000000:1:dog", b"3.000000:2"], [b"9.000000:2", b"0.500000:0:cat"]]
        }

    run(tmp_path, test)


def test_classes_of_a_model_without_batches_have_no_batch_axis(tmp_path: Path) -> None:
    write_labelled(tmp_path, max_batch_size=0)

    async def test(service: InferenceService) -> None:
        request = asked(
            inputs=[tensor("INPUT0", [1, 3, 2], "FP32")], outputs=[WantedOutput(name="OUTPUT0", num_classes=1)]
        )
        assert values(await service.infer(request)) == {"OUTPUT0": [b"3.000000:1:dog"]}

    run(tmp_path, test)


def test_strings_have_no_classes(tmp_path: Path) -> None:
    write_identity(tmp_path, datatype="BYTES")

    async def test(service: InferenceService) -> None:
        request = asked(
            inputs=[tensor("INPUT0", [["a"]], "BYTES")], outputs=[WantedOutput(name="OUTPUT0", num_classes=1)]
        )
        with pytest.raises(InvalidRequest, match="class result not available for output 'OUTPUT0'"):
            await service.infer(request)

    run(tmp_path, test)


# Shared memory --------------------------------------------------------------------------------------------------------


def shared(name: str, offset: int = 0, size_bytes: int = 4, *, shape: tuple[int, ...] = (1, 1), region: str = "r"):
    data = RegionSlice(region=region, offset=offset, size_bytes=size_bytes)
    return SharedInput(name=name, datatype="INT32", shape=shape, data=data)


def into(name: str, offset: int, size_bytes: int = 4, region: str = "r") -> WantedOutput:
    return WantedOutput(name=name, data=RegionSlice(region=region, offset=offset, size_bytes=size_bytes))


def register(service: InferenceService, byte_size: int = SIZE) -> None:
    service.register_shared_memory("r", key="/shm", offset=0, byte_size=byte_size)


def test_tensors_come_from_and_go_to_shared_memory(root: Path) -> None:
    (root / "shm").write_bytes(np.array([7, 2], np.int32).tobytes() + bytes(SIZE - 8))

    async def test(service: InferenceService) -> None:
        register(service)
        request = asked(
            inputs=[shared("INPUT0"), shared("INPUT1", 4)],
            outputs=[into("OUTPUT1", 16, 100), WantedOutput(name="OUTPUT0")],
        )
        told, sent = (await service.infer(request)).outputs
        # What was written, not what there was room for.
        assert told == SharedOutput(
            name="OUTPUT1",
            datatype="INT32",
            shape=(1, 1),
            data=RegionSlice(region="r", offset=16, size_bytes=4),
        )
        assert sent.array.tolist() == [[9]]  # type: ignore[union-attr]
        assert np.frombuffer((root / "shm").read_bytes(), np.int32)[4] == 5

    run(root, test, allow_client_shm=True)


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"inputs": [shared("INPUT0", SIZE)]}, "Invalid offset for shared memory region: 'r'"),
        ({"inputs": [shared("INPUT0", -1)]}, "Invalid offset for shared memory region: 'r'"),
        ({"inputs": [shared("INPUT0", SIZE - 3)]}, r"Invalid offset \+ byte size for shared memory region: 'r'"),
        ({"inputs": [shared("INPUT0", region="x")]}, "Unable to find shared memory region: 'x'"),
        ({"inputs": [shared("INPUT0", size_bytes=8), shared("INPUT1")]}, "input byte size mismatch for input 'INPUT0'"),
        ({"inputs": [shared("INPUT0", shape=(-1, 1)), shared("INPUT1")]}, "one or more invalid dimensions"),
        ({"outputs": [into("OUTPUT0", SIZE)]}, "Invalid offset for shared memory region: 'r'"),
        ({"outputs": [into("OUTPUT0", SIZE - 3)]}, r"Invalid offset \+ byte size for shared memory region: 'r'"),
        ({"outputs": [into("OUTPUT0", 0, region="x")]}, "Unable to find shared memory region: 'x'"),
    ],
)
def test_slices_outside_of_their_region_are_refused_before_anything_runs(
    root: Path, request_: dict[str, Any], match: str
) -> None:
    async def test(service: InferenceService) -> None:
        register(service)
        with pytest.raises(InvalidRequest, match=match):
            await service.infer(asked(**request_))
        assert sum(each.execution_count for each in service.statistics("m")) == 0

    run(root, test, allow_client_shm=True)


def test_output_that_its_slice_cannot_hold_is_refused_and_not_written(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        register(service)
        with pytest.raises(InvalidRequest, match=r"for output 'OUTPUT0' \(3 bytes\) should be at least 4 bytes"):
            await service.infer(asked(outputs=[into("OUTPUT0", 0, 3)]))
        assert (root / "shm").read_bytes() == bytes(SIZE)

    run(root, test, allow_client_shm=True)


@pytest.mark.parametrize("num_inputs", [1, 2])
def test_inputs_in_shared_memory_are_bounded_together_before_they_are_read(root: Path, num_inputs: int) -> None:
    with (root / "shm").open("r+b") as file:
        file.truncate(1 << 40)  # takes no memory

    async def test(service: InferenceService) -> None:
        register(service, 1 << 40)
        size = (1 << 20) // num_inputs + 4
        inputs = [shared(f"INPUT{n}", size_bytes=size, shape=(1, size // 4)) for n in range(num_inputs)]
        with pytest.raises(PayloadTooLarge, match=f"input 'INPUT{num_inputs - 1}' in shared memory is larger than"):
            await service.infer(asked(inputs=inputs))

    run(root, test, allow_client_shm=True, max_inflight_tensor_bytes=1 << 20)


def test_shared_memory_is_refused_unless_the_operator_allows_it(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        with pytest.raises(UnsupportedFeature, match="Client shared memory is disabled"):
            register(service)
        with pytest.raises(UnsupportedFeature, match="Client shared memory is disabled"):
            await service.infer(asked(inputs=[shared("INPUT0"), shared("INPUT1", 4)]))
        with pytest.raises(UnsupportedFeature, match="Client shared memory is disabled"):
            await service.infer(asked(outputs=[into("OUTPUT0", 0)]))
        assert service.shared_memory_status() == []
        service.unregister_shared_memory()

    run(root, test)


def test_regions_are_told_and_forgotten(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        register(service)
        (status,) = service.shared_memory_status("r")
        assert (status.name, status.key, status.byte_size) == ("r", "/shm", SIZE)
        service.unregister_shared_memory("r")
        assert service.shared_memory_status() == []
        with pytest.raises(InvalidRequest, match="Unable to find system shared memory region: 'r'"):
            service.shared_memory_status("r")
        with pytest.raises(UnsupportedFeature, match="CUDA shared memory is not supported"):
            service.refuse_cuda_shared_memory()

    run(root, test, allow_client_shm=True)


# Control --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "poll"])
def test_loading_and_unloading_are_for_the_explicit_mode(root: Path, mode: str) -> None:
    async def test(service: InferenceService) -> None:
        for work in (service.load("m", {}), service.unload("m")):
            with pytest.raises(
                ModelNotReady, match="explicit model load / unload is not allowed if polling is enabled"
            ):
                await work
        assert service.is_model_ready("m")

    run(root, test, model_control_mode=mode)


def run_explicit(root: Path, test: Callable[[InferenceService], Awaitable[None]], **options: Any) -> None:
    run(root, test, model_control_mode="explicit", **options)


def test_models_come_and_go(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        await service.unload("m")
        assert not service.is_model_ready("m")
        with pytest.raises(ModelNotReady, match="'m' has no available versions: unloaded"):
            await service.infer(asked())
        await service.load("m", {})
        assert values(await service.infer(asked()))["OUTPUT0"] == [[9]]
        await service.unload("x")  # no error

    run_explicit(root, test)


def test_loads_that_fail_say_why_in_tritons_words(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        with pytest.raises(InvalidRequest, match=r"^failed to load 'x', failed to poll from model repository"):
            await service.load("x", {})
        match = "^load failed for model 'broken': version 1 is at UNAVAILABLE state: .*ONNX Runtime .* cannot open it"
        with pytest.raises(InvalidRequest, match=match) as refusal:
            await service.load("broken", {})
        assert str(root) not in refusal.value.message
        for config in ("{", '{"no_such_field": 1}', "[]"):
            with pytest.raises(InvalidRequest, match=r"^failed to load 'm', failed to poll from model repository: "):
                await service.load("m", {"config": config})
        assert service.is_model_ready("m")

    run_explicit(root, test)


def test_config_may_be_brought_along(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        await service.load("m", {"config": json.dumps({"max_batch_size": "16"})})
        assert service.config("m").max_batch_size == 16

    run_explicit(root, test)


@pytest.mark.parametrize(
    ("parameters", "key", "kind"),
    [
        ({"verbose": "1"}, "verbose", "string"),
        ({"config": b"{}"}, "config", "bytes"),
        ({"file:1/model.onnx": "text"}, "file:1/model.onnx", "string"),
        ({"config": "{}", "file": b""}, "file", "bytes"),
    ],
)
def test_unknown_load_parameters_are_refused(root: Path, parameters: dict[str, Any], key: str, kind: str) -> None:
    async def test(service: InferenceService) -> None:
        with pytest.raises(InvalidRequest, match=f"^Unrecognized load parameter '{key}' with type '{kind}'$"):
            await service.load("m", parameters)

    run_explicit(root, test, allow_file_override=True)


def test_files_are_refused_unless_the_operator_allows_them(root: Path) -> None:
    data = tiny_tensors.serialize(tiny_tensors.identity())

    async def test(service: InferenceService) -> None:
        with pytest.raises(PermissionDenied, match="allow_file_override"):
            await service.load("new", {"config": "{}", "file:1/model.onnx": data})

    run_explicit(root, test)


def test_files_make_a_model_where_they_are_allowed(root: Path) -> None:
    data = tiny_tensors.serialize(tiny_tensors.identity())

    async def test(service: InferenceService) -> None:
        with pytest.raises(InvalidRequest, match=r"^failed to load 'new', .*: files need a config beside them"):
            await service.load("new", {"file:1/model.onnx": data})
        with pytest.raises(InvalidRequest, match=r"Invalid file parameter '\.\./x' must stay within model directory"):
            await service.load("new", {"config": "{}", "file:../x": data})
        await service.load("new", {"config": "{}", "file:1/model.onnx": data})
        reply = await service.infer(asked(name="new", inputs=[tensor("INPUT0", [[1.5]], "FP32")]))
        assert values(reply) == {"OUTPUT0": [[1.5]]}

    run_explicit(root, test, allow_file_override=True)


# Settings -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def level() -> Iterator[None]:
    """The level of our log is as before afterwards."""
    logger = logging.getLogger("sardonyx")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before)


def test_settings_change_only_by_the_operators_leave(root: Path, level: None) -> None:
    async def test(service: InferenceService) -> None:
        with pytest.raises(PermissionDenied, match="allow_setting_updates"):
            service.update_trace_settings({"trace_rate": ["1"]})
        with pytest.raises(PermissionDenied, match="allow_setting_updates"):
            service.update_log_settings({"log_info": False})
        # Nothing to change is a question.
        assert service.update_trace_settings({}) == service.trace_settings() == TraceSettings()
        assert service.update_log_settings({}) == service.log_settings() == LogSettings()

    run(root, test)


def test_settings_change_all_at_once_or_not_at_all(root: Path, level: None) -> None:
    async def test(service: InferenceService) -> None:
        assert service.update_trace_settings({"trace_rate": ["9"]}, "m").trace_rate == "9"
        assert service.trace_settings().trace_rate == "1000"
        with pytest.raises(InvalidRequest):
            service.update_trace_settings({"trace_rate": ["8"], "trace_mode": ["x"]}, "m")
        with pytest.raises(UnsupportedFeature):
            service.update_trace_settings({"trace_rate": ["8"], "trace_file": ["/tmp/x"]}, "m")
        assert service.trace_settings("m").trace_rate == "9"
        with pytest.raises(UnsupportedFeature):
            service.update_log_settings({"log_info": False, "log_file": "/tmp/x"})
        assert service.log_settings() == LogSettings()
        assert not service.update_log_settings({"log_info": False}).log_info

    run(root, test, allow_setting_updates=True)


def test_trace_settings_of_an_unknown_model_are_not_found(root: Path) -> None:
    async def test(service: InferenceService) -> None:
        for use in (service.trace_settings, lambda name: service.update_trace_settings({}, name)):
            with pytest.raises(ModelNotFound, match=r"^Request for unknown model : x$"):
                use("x")

    run(root, test)


def test_cancelling_an_inference_aborts_it(tmp_path: Path) -> None:
    write_identity(tmp_path, rest=tensor_serving.HOLD)

    async def test(service: InferenceService) -> None:
        task = asyncio.create_task(service.infer(asked(inputs=[tensor("INPUT0", [[1]])])))
        await asyncio.sleep(0)
        (statistics,) = service.statistics("m")
        assert statistics.num_pending == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (statistics.num_pending, statistics.failures) == (0, {"CANCELED": 1})

    run(tmp_path, test)
