"""Loading, unloading and the index, as a repository's owner does it from outside."""

import base64

import msgspec
import numpy as np
import pytest
from tests.conformance.process import serve
from tests.conformance.triton import (
    FORBIDDEN,
    INVALID,
    NOT_READY,
    UNSUPPORTED,
    Caller,
    check_sums,
    copy_examples,
    pair,
    post,
    post_json,
)
from tests.tiny_tensors import add_sub, serialize, truncated, write_model
from tritonclient.grpc import service_pb2

EXAMPLES = (
    "simple",
    "simple_ensemble",
    "simple_identity",
    "simple_int8",
    "simple_sequence",
    "simple_string",
    "simple_dyna_sequence",
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    root = tmp_path_factory.mktemp("explicit")
    copy_examples(root, *EXAMPLES)
    write_model(root, "broken", truncated(add_sub()))
    return root


@pytest.fixture(scope="module")
def explicit(repository):
    flags = ["--model-control-mode", "explicit", "--load-model", "simple_string", "--allow-file-override"]
    with serve(repository, repository / "server.log", *flags) as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def owner(request, explicit):
    """A client of the server in explicit mode, whose models are afterwards as they were before."""
    with Caller(request.param, explicit) as caller:
        yield caller
        for name, row in caller.index().items():
            if row.get("state") == "READY" and name != "simple_string":
                caller.client.unload_model(name)
        caller.client.load_model("simple_string")


def state(caller, name):
    row = caller.index()[name]
    return row.get("state"), row.get("reason", "")


def test_the_index_lists_every_model_of_the_repository(owner):
    assert set(owner.index()) == {*EXAMPLES, "broken"}


def test_only_the_named_models_are_loaded_at_the_start(explicit):
    with Caller("http", explicit) as caller:
        assert caller.client.is_server_ready()
        assert caller.client.is_model_ready("simple_string")
        assert not caller.client.is_model_ready("simple")


def test_a_model_is_used_between_load_and_unload(owner):
    assert not owner.client.is_model_ready("simple")
    owner.client.load_model("simple")
    assert owner.client.is_model_ready("simple")
    assert state(owner, "simple") == ("READY", "")
    check_sums(owner.infer("simple", pair()), pair())
    owner.client.unload_model("simple")
    assert not owner.client.is_model_ready("simple")
    assert state(owner, "simple") == ("UNAVAILABLE", "unloaded")
    refusal = owner.refusal("simple", pair())
    assert refusal.status in NOT_READY
    assert "Request for unknown model: 'simple' has no available versions" in refusal.message


def test_loading_twice_does_nothing_the_second_time(owner):
    owner.client.load_model("simple")
    owner.infer("simple", pair())
    owner.client.load_model("simple")
    assert owner.client.is_model_ready("simple")


def test_unloading_leaves_the_server_ready(owner):
    owner.client.load_model("simple")
    owner.client.unload_model("simple")
    assert owner.client.is_server_ready()


def test_an_unknown_model_cannot_be_loaded(owner):
    refusal = owner.refused(lambda: owner.client.load_model("no_such"))
    assert "failed to load 'no_such', failed to poll from model repository" in refusal.message
    assert refusal.status in INVALID


def test_unloading_an_unknown_model_is_no_error(owner):
    owner.client.unload_model("no_such")


def test_a_model_that_cannot_be_loaded_says_why_and_leaves_the_others(owner):
    refusal = owner.refused(lambda: owner.client.load_model("broken"))
    assert refusal.status in INVALID
    assert "load failed for model 'broken': version 1 is at UNAVAILABLE state: " in refusal.message
    assert state(owner, "broken")[0] == "UNAVAILABLE"
    assert owner.client.is_model_ready("simple_string")


def test_a_config_may_be_given_with_the_load(owner):
    """With numbers as text, as protobuf's JSON allows."""
    owner.client.load_model("simple", config='{"max_batch_size": "16"}')
    config = owner.show("get_model_config", "simple")
    config = config if owner.protocol == "http" else config["config"]
    assert config["max_batch_size"] == 16
    check_sums(owner.infer("simple", pair(rows=16)), pair(rows=16))


def test_a_config_of_one_load_is_gone_after_an_unload(owner):
    owner.client.load_model("simple", config='{"max_batch_size": 16}')
    owner.client.unload_model("simple")
    owner.client.load_model("simple")
    assert "batch-size must be <= 8" in owner.refusal("simple", pair(rows=16)).message


@pytest.mark.parametrize(
    "config",
    ['{"max_batch_size": "many"}', '{"levitation": true}', "[]", '{"max_batch_size": -1}', '{"name": "other"}', "{"],
)
def test_a_config_that_is_none_is_refused_and_the_old_model_stays(owner, config):
    owner.client.load_model("simple")
    refusal = owner.refused(lambda: owner.client.load_model("simple", config=config))
    assert refusal.status in INVALID
    assert "failed" in refusal.message
    check_sums(owner.infer("simple", pair()), pair())


def test_a_model_may_be_brought_along(owner):
    files = {"file:1/model.onnx": serialize(add_sub("FP32", shape=(4,)))}
    owner.client.load_model("simple", config='{"backend": "onnxruntime"}', files=files)
    tensors = {"INPUT0": np.ones((1, 4), np.float32), "INPUT1": np.ones((1, 4), np.float32)}
    np.testing.assert_array_equal(owner.infer("simple", tensors).as_numpy("OUTPUT0"), [[2, 2, 2, 2]])
    owner.client.unload_model("simple")
    owner.client.load_model("simple")
    check_sums(owner.infer("simple", pair()), pair())


@pytest.mark.parametrize("path", ["../escape/model.onnx", "{tmp}/model.onnx", "1/../../model.onnx", "model.onnx"])
def test_files_stay_inside_the_model(owner, repository, tmp_path, path):
    files = {f"file:{path.format(tmp=tmp_path)}": serialize(add_sub())}
    before = {each for each in repository.rglob("*") if each.name != "server.log"}
    refusal = owner.refused(lambda: owner.client.load_model("simple", config='{"backend": "onnxruntime"}', files=files))
    assert refusal.status in INVALID
    assert {each for each in repository.rglob("*") if each.name != "server.log"} == before
    assert list(tmp_path.iterdir()) == []


def test_files_need_a_config(owner):
    def load():
        if owner.protocol == "http":
            content = base64.b64encode(serialize(add_sub())).decode()
            status, answer = post_json(
                owner.server,
                "/v2/repository/models/simple/load",
                {"parameters": {"file:1/model.onnx": content}},
            )
            return str(status), answer["error"]
        refusal = owner.refused(
            lambda: owner.client.load_model("simple", files={"file:1/model.onnx": serialize(add_sub())})
        )
        return refusal.status, refusal.message

    status, message = load()
    assert status in INVALID
    assert "failed to load 'simple', failed to poll from model repository" in message


def test_a_repository_may_not_be_named(explicit):
    for path in ("/v2/repository/here/index", "/v2/repository/here/models/simple/load"):
        status, answer = post_json(explicit, path, {})
        assert (status, answer["error"]) == (501, "'repository_name' specification is not supported")


def test_an_ensemble_brings_its_parts_and_takes_them_along_when_told(owner):
    owner.client.load_model("simple_ensemble")
    assert owner.client.is_model_ready("simple")
    np.testing.assert_array_equal(owner.infer("simple_ensemble", pair()).as_numpy("OUTPUT1"), 2 * pair()["INPUT1"])
    owner.client.unload_model("simple_ensemble", unload_dependents=True)
    assert not owner.client.is_model_ready("simple_ensemble")
    assert not owner.client.is_model_ready("simple")


def test_the_index_may_be_of_ready_models_only(explicit):
    status, rows = post_json(explicit, "/v2/repository/index", {"ready": True})
    assert status == 200
    assert [(row["name"], row["version"], row["state"]) for row in rows] == [("simple_string", "1", "READY")]
    with Caller("grpc", explicit) as caller:
        request = service_pb2.RepositoryIndexRequest(ready=True)
        answer = caller.client._client_stub.RepositoryIndex(request, timeout=30)
        assert [row.name for row in answer.models] == ["simple_string"]


def test_the_index_takes_an_empty_body(explicit):
    status, _, body = post(explicit, "/v2/repository/index", b"")
    assert status == 200
    assert len(msgspec.json.decode(body)) == len(EXAMPLES) + 1


@pytest.mark.parametrize("parameters", [{"colour": "red"}, {"config": 7}])
def test_load_parameters_that_there_are_not_are_refused(explicit, parameters):
    status, answer = post_json(explicit, "/v2/repository/models/simple/load", {"parameters": parameters})
    assert status == 400
    assert "Unrecognized load parameter" in answer["error"]


@pytest.mark.parametrize("method", ["load_model", "unload_model"])
def test_models_are_not_changed_outside_of_explicit_mode(caller, method):
    refusal = caller.refused(lambda: getattr(caller.client, method)("simple"))
    assert refusal.status in NOT_READY
    assert refusal.message == "explicit model load / unload is not allowed if polling is enabled"


def test_other_files_are_refused_by_default(repository, tmp_path):
    flags = ["--model-control-mode", "explicit", "--load-model", "simple_identity"]
    with serve(repository, tmp_path / "server.log", *flags) as server:
        for protocol in ("http", "grpc"):
            with Caller(protocol, server) as caller:
                files = {"file:1/model.onnx": serialize(add_sub())}
                refusal = caller.refused(
                    lambda caller=caller, files=files: caller.client.load_model("simple", config="{}", files=files)
                )
                assert refusal.status in FORBIDDEN
                assert "allow_file_override" in refusal.message


def test_a_reload_serves_the_new_version_without_a_gap(owner, repository):
    """A version that appears between two loads is the one for requests that name none."""
    owner.client.load_model("simple_int8")
    write_model(repository, "simple_int8", add_sub("INT8"), version=2)
    try:
        owner.client.load_model("simple_int8")
        metadata = owner.show("get_model_metadata", "simple_int8")
        assert metadata["versions"] == ["2"]
    finally:
        (repository / "simple_int8" / "2" / "model.onnx").unlink()
        (repository / "simple_int8" / "2").rmdir()


def test_unsupported_requests_are_told_so_over_grpc(explicit):
    with Caller("grpc", explicit) as caller:
        request = service_pb2.RepositoryModelLoadRequest(repository_name="here", model_name="simple")
        stub = caller.client._client_stub
        with pytest.raises(Exception, match="'repository_name' specification is not supported") as refusal:
            stub.RepositoryModelLoad(request, timeout=30)
        assert refusal.value.code().name in UNSUPPORTED
