"""What the server says about itself and its models, and the two APIs beside each other."""

import msgspec
import pytest
import tritonclient.http.aio
from google.protobuf import json_format
from tests.conformance.triton import (
    DATATYPES,
    FORBIDDEN,
    NOT_FOUND,
    UNSUPPORTED,
    Caller,
    address,
    as_numbers,
    pair,
    post,
    run,
)
from tritonclient.grpc.model_config_pb2 import ModelConfig

EXAMPLES = (
    "simple",
    "simple_accumulate",
    "simple_classes",
    "simple_dyna_sequence",
    "simple_ensemble",
    "simple_identity",
    "simple_int8",
    "simple_sequence",
    "simple_string",
    "simple_string_dyna_sequence",
)


def test_the_server_is_live_and_ready(caller):
    assert caller.client.is_server_live()
    assert caller.client.is_server_ready()


@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_is_ready(caller, version):
    assert caller.client.is_model_ready("simple", version)


def test_what_is_not_there_is_not_ready(caller):
    assert not caller.client.is_model_ready("no_such")
    assert not caller.client.is_model_ready("simple", "3")


def test_health_has_no_body(triton):
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/simple/ready",
        "/v2/models/simple/versions/1/ready",
    ):
        assert triton.request("GET", path) == (200, "")


def test_an_unready_model_is_told_as_triton_tells_it(triton):
    assert triton.request("GET", "/v2/models/no_such/ready") == (400, {"error": "Model version not ready"})


def test_the_server_has_its_name_and_extensions(caller):
    metadata = caller.show("get_server_metadata")
    assert metadata["name"] == "triton"
    assert metadata["version"]
    assert {
        "classification",
        "sequence",
        "model_repository",
        "model_configuration",
        "system_shared_memory",
        "binary_tensor_data",
        "parameters",
        "statistics",
        "trace",
        "logging",
    } <= set(metadata["extensions"])
    assert "cuda_shared_memory" not in metadata["extensions"]


def test_a_slash_behind_v2_does_not_matter(triton):
    assert triton.request("GET", "/v2/") == triton.request("GET", "/v2")


def test_both_protocols_say_the_same_of_the_server(http, grpc):
    assert http.show("get_server_metadata") == grpc.show("get_server_metadata")


def test_a_server_has_a_name_of_its_own_where_none_is_given(guarded):
    status, metadata = guarded.request("GET", "/v2", Authorization="Bearer user-key")
    assert (status, metadata["name"]) == (200, "sardonyx")
    assert "system_shared_memory" not in metadata["extensions"]


def test_a_model_tells_its_tensors(caller):
    metadata = as_numbers(caller.show("get_model_metadata", "simple"))
    assert metadata["name"] == "simple"
    assert metadata["platform"] == "onnxruntime_onnx"
    assert [str(version) for version in metadata["versions"]] == ["1"]
    for side in ("input", "output"):
        assert metadata[f"{side}s"] == [
            {"name": f"{side.upper()}{index}", "datatype": "INT32", "shape": metadata["inputs"][0]["shape"]}
            for index in range(2)
        ]


@pytest.mark.parametrize("model", [*EXAMPLES, "tiny", "slow", "three_inputs"])
def test_both_protocols_say_the_same_of_a_model(http, grpc, model):
    of_grpc = grpc.client.get_model_metadata(model)
    of_http = http.client.get_model_metadata(model)
    assert of_http["versions"] == list(of_grpc.versions)
    assert of_http["platform"] == of_grpc.platform
    for side in ("inputs", "outputs"):
        assert of_http[side] == [
            {"name": each.name, "datatype": each.datatype, "shape": list(each.shape)} for each in getattr(of_grpc, side)
        ]


@pytest.mark.parametrize("model", [*EXAMPLES, "tiny", "slow", "cached", "identity_bf16"])
def test_both_protocols_show_the_same_config(http, grpc, model):
    shown = json_format.ParseDict(http.client.get_model_config(model), ModelConfig())
    assert shown == grpc.client.get_model_config(model).config


def test_a_config_is_complete_and_has_its_numbers_as_numbers(http):
    config = http.client.get_model_config("simple")
    assert config["name"] == "simple"
    assert (config["platform"], config["backend"]) == ("onnxruntime_onnx", "onnxruntime")
    assert config["max_batch_size"] == 8
    assert config["input"][0]["data_type"] == "TYPE_INT32"
    assert config["input"][0]["dims"] == [16]
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert config["instance_group"][0]["kind"] == "KIND_CPU"


def test_what_perf_analyzer_reads_of_configs_is_there(http):
    """Decoupling, batching and the steps of ensembles with their versions."""
    assert http.client.get_model_config("tiny")["model_transaction_policy"] == {"decoupled": True}
    assert "sequence_batching" in http.client.get_model_config("simple_sequence")
    assert "dynamic_batching" in http.client.get_model_config("simple_classes")
    assert http.client.get_model_config("cached")["response_cache"] == {"enable": True}
    ensemble = http.client.get_model_config("simple_ensemble")
    assert ensemble["platform"] == "ensemble"
    steps = ensemble["ensemble_scheduling"]["step"]
    assert [(step["model_name"], step["model_version"]) for step in steps] == [("simple", -1), ("simple", -1)]


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config"])
def test_an_unknown_model_is_not_found(caller, method):
    refusal = caller.refused(lambda: getattr(caller.client, method)("wrong_model_name"))
    assert refusal.status in NOT_FOUND
    assert "Request for unknown model: 'wrong_model_name' is not found" in refusal.message


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config"])
def test_an_unknown_version_is_not_found(caller, method):
    refusal = caller.refused(lambda: getattr(caller.client, method)("simple", "3"))
    assert refusal.status in NOT_FOUND
    assert "Request for unknown model: 'simple' version 3 is not found" in refusal.message


def test_the_index_lists_everything_and_the_models_of_openai_only_what_speaks(caller):
    index = caller.index()
    assert {*EXAMPLES, *(f"identity_{each.lower()}" for each in DATATYPES), "tiny", "slow"} <= set(index)
    assert all(row["state"] == "READY" and row["version"] == "1" for row in index.values())
    status, models = caller.server.request("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in models["data"]] == ["tiny"]


def test_text_and_tensors_are_served_side_by_side(caller):
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 3, "ignore_eos": True}
    status, answer = caller.server.request("POST", "/v1/completions", body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    assert caller.infer("simple", pair()).as_numpy("OUTPUT0")[0, 0] == 1
    status, answer = caller.server.request("POST", "/v1/completions", {**body, "model": "simple"})
    assert status in {400, 404}
    assert "simple" in answer["error"]["message"]


def test_metadata_can_be_asked_with_asyncio(triton):
    async def ask():
        async with tritonclient.http.aio.InferenceServerClient(address(triton, "http")) as client:
            return (
                await client.is_server_live(),
                await client.is_model_ready("simple"),
                (await client.get_server_metadata())["name"],
                (await client.get_model_config("simple"))["max_batch_size"],
                len(await client.get_model_repository_index()) > len(EXAMPLES),
            )

    assert run(ask()) == (True, True, "triton", 8, True)


def test_trace_settings_have_tritons_form(caller):
    settings = caller.show("get_trace_settings")
    settings = settings if caller.protocol == "http" else _values(settings)
    assert settings["trace_level"] == ["OFF"]
    assert settings["trace_rate"] == "1000"
    assert settings["trace_count"] == "-1"
    assert settings["log_frequency"] == "0"


def _values(settings):
    """Of gRPC's lists of texts, single ones as text but for the level."""
    lists = {name: each.get("value", [""]) for name, each in settings["settings"].items()}
    return {name: values if name == "trace_level" else values[0] for name, values in lists.items()}


def test_a_models_trace_settings_are_its_own_until_they_are_cleared(caller):
    def rate(model=None):
        settings = caller.show("get_trace_settings", model)
        return (settings if caller.protocol == "http" else _values(settings))["trace_rate"]

    caller.client.update_trace_settings("simple", settings={"trace_rate": "12", "trace_level": ["TIMESTAMPS"]})
    assert (rate("simple"), rate()) == ("12", "1000")
    caller.client.update_trace_settings("simple", settings={"trace_rate": None, "trace_level": None})
    assert rate("simple") == "1000"


def test_global_trace_settings_hold_for_every_model(caller):
    caller.client.update_trace_settings(settings={"trace_rate": "7"})
    settings = caller.show("get_trace_settings", "simple")
    assert (settings if caller.protocol == "http" else _values(settings))["trace_rate"] == "7"
    caller.client.update_trace_settings(settings={"trace_rate": None})
    settings = caller.show("get_trace_settings")
    assert (settings if caller.protocol == "http" else _values(settings))["trace_rate"] == "1000"


@pytest.mark.parametrize(("settings", "status"), [({"trace_file": "/tmp/x"}, UNSUPPORTED), ({"log_file": "x"}, None)])
def test_files_cannot_be_set_over_the_network(caller, settings, status):
    if "trace_file" in settings:
        refusal = caller.refused(lambda: caller.client.update_trace_settings(settings=settings))
        assert refusal.message == "trace file location can not be updated through network protocol"
    else:
        refusal = caller.refused(lambda: caller.client.update_log_settings(settings))
        assert refusal.message == "log file location can not be updated through network protocol"
    assert refusal.status in UNSUPPORTED


def test_log_settings_are_shown_and_changed(caller):
    def setting(shown, name):
        if caller.protocol == "http":
            return shown[name]
        (value,) = shown["settings"][name].values() or [False]
        return value

    shown = caller.show("get_log_settings")
    assert setting(shown, "log_info") is True
    assert setting(shown, "log_format") == "default"
    caller.client.update_log_settings({"log_verbose_level": 1, "log_format": "ISO8601"})
    shown = caller.show("get_log_settings")
    assert (setting(shown, "log_verbose_level"), setting(shown, "log_format")) == (1, "ISO8601")
    caller.client.update_log_settings({"log_verbose_level": 0, "log_format": "default"})


def test_settings_may_be_changed_by_an_empty_body(triton):
    for path in ("/v2/logging", "/v2/trace/setting"):
        status, _, body = post(triton, path, b"")
        assert status == 200
        assert msgspec.json.decode(body) == triton.request("GET", path)[1]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_settings_cannot_be_changed_by_default(guarded, protocol):
    headers = {"authorization": "Bearer admin-key"}
    with Caller(protocol, guarded) as caller:
        for update in (
            lambda: caller.client.update_log_settings({"log_info": False}, headers=headers),
            lambda: caller.client.update_trace_settings(settings={"trace_rate": "1"}, headers=headers),
        ):
            refusal = caller.refused(update)
            assert refusal.status in FORBIDDEN
            assert refusal.message == "the operator has not set allow_setting_updates"
