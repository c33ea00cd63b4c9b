"""The life of models as Triton's own tests have it (qa/L0_lifecycle), by their names, on a real process.

Where Triton sleeps, these wait for what has to happen.
"""

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
from random import Random

import pytest
from tests.conformance.lifecycle import (
    A_WHILE,
    ALL_VERSIONS,
    ONE_AT_A_TIME,
    Callers,
    answer,
    ensemble,
    place,
    plus,
    rows,
    turn,
    write_ensemble,
    write_slow_to_load,
)
from tests.conformance.process import serve
from tests.conformance.triton import INVALID, NOT_FOUND, NOT_READY, Caller, pending
from tests.tiny_tensors import config_text, serialize, slow, truncated, write_model
from tritonclient.utils import InferenceServerException

EXPLICIT = ["--model-control-mode", "explicit", "--allow-file-override"]
POLL = ["--model-control-mode", "poll", "--repository-poll-s", "0.05"]
UNLOADED = ("1", "UNAVAILABLE", "unloaded")


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A server whose models clients load, and its repository. A test has models of its own."""
    root = tmp_path_factory.mktemp("explicit") / "repository"
    root.mkdir()
    with serve(root, root.parent / "log", *EXPLICIT) as server:
        yield server, root
        assert server.process.poll() is None
        assert "Traceback" not in server.log()


@pytest.fixture(params=["http", "grpc"])
def owner(request, controlled):
    with Caller(request.param, controlled[0]) as caller:
        yield caller


@pytest.fixture
def root(controlled, request):
    """The repository, empty again afterwards."""
    server, root = controlled
    yield root
    with Caller("http", server) as caller:
        for folder in list(root.iterdir()):
            caller.client.unload_model(folder.name)
            shutil.rmtree(folder)
        caller.client.get_model_repository_index()  # and the server has forgotten them


@pytest.fixture(scope="module")
def polling(tmp_path_factory):
    """A server that follows two repositories."""
    folder = tmp_path_factory.mktemp("poll")
    roots = [folder / "one", folder / "two"]
    for each in roots:
        each.mkdir()
    with serve(roots[0], folder / "log", *POLL, "--more-repositories", str(roots[1])) as server:
        with Caller("http", server) as caller:
            yield caller, roots
        assert "Traceback" not in server.log()


def becomes(caller, name, expected):
    """Wait until the index shows that of a model."""
    caller.server.wait_for(lambda: rows(caller, name) == expected)


# Start


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A repository with good and bad models."""
    root = tmp_path_factory.mktemp("faulty") / "repository"
    write_model(root, "good", plus(1), config=config_text())
    write_model(root, "bad_config", plus(1), config="max_batch_size: many")
    write_model(root, "bad_graph", truncated(plus(1)), config=config_text())
    (root / "no_version").mkdir()
    (root / "no_version/config.pbtxt").write_text(config_text())
    for name, folder in (("zero_prefixed", "007"), ("not_integral", "abc")):
        write_model(root, name, plus(1), version=1, config=config_text(rest=ALL_VERSIONS))
        write_model(root, name, plus(2), version=2)
        (root / name / "2").rename(root / name / folder)
    return root


@pytest.fixture(scope="module")
def started_faulty(faulty):
    with (
        serve(faulty, faulty.parent / "log", until="/v2/health/live") as server,
        Caller("http", server) as caller,
    ):
        server.wait_for(lambda: "are ready after" in server.log())
        yield caller


def test_parse_error_noexit(started_faulty):
    client = started_faulty.client
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert client.get_server_metadata()["name"] == "sardonyx"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bad_config", "config.pbtxt:1: max_batch_size"),
        ("bad_graph", "model.onnx"),
    ],
)
def test_parse_error_modelfail(started_faulty, name, reason):
    assert answer(started_faulty, "good") == 1
    assert not started_faulty.client.is_model_ready(name)
    (row,) = rows(started_faulty, name)
    assert row[-2] == "UNAVAILABLE"
    assert reason in row[-1]
    assert "/" not in row[-1]


def test_parse_error_model_no_version(started_faulty):
    assert not started_faulty.client.is_model_ready("no_version")
    assert rows(started_faulty, "no_version") == [("UNAVAILABLE", "no_version: has no version to serve")]


@pytest.mark.parametrize(("name", "ignored"), [("zero_prefixed", "7"), ("not_integral", "2")])
def test_parse_ignore_zero_prefixed_and_non_integral_version(started_faulty, name, ignored):
    assert answer(started_faulty, name) == 1
    assert rows(started_faulty, name) == [("1", "READY")]
    refusal = started_faulty.refused(lambda: answer(started_faulty, name, ignored))
    assert refusal.status in NOT_FOUND
    assert f"'{name}' version {ignored} is not found" in refusal.message


def test_parse_error_modelfail_nostrict(faulty, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    flags = ["--no-strict-readiness", "--metrics-port", str(metrics_port)]
    with serve(faulty, tmp_path / "log", *flags) as server, Caller("grpc", server) as caller:
        assert caller.client.is_server_ready()
        server.wait_for(lambda: "are ready after" in server.log())
        assert caller.client.is_server_ready()
        assert not caller.client.is_model_ready("bad_config")
        assert caller.client.is_model_ready("good")
        server.port = metrics_port  # which has metrics and nothing else
        assert 'nv_inference_request_success{model="good"' in server.request("GET", "/metrics")[1]
        assert server.request("GET", "/v2")[0] == 404


def command(root, *flags):
    """A server that ends by itself: its exit code and the last line of what it said."""
    words = [sys.executable, "-m", "sardonyx", "serve", str(root), *flags]
    done = subprocess.run(words, capture_output=True, timeout=60, cwd=root.parent, check=False)
    assert b"Traceback" not in done.stderr
    return done.returncode, done.stderr.decode().splitlines()[-1]


def test_a_failure_at_the_start_ends_the_process_where_that_is_asked_for(faulty):
    code, line = command(faulty, "--port", "0", "--grpc-port", "0", "--exit-on-error")
    assert code == 2
    assert line == "sardonyx: exit_on_error: failed to load all models: bad_config, bad_graph, no_version"


def test_a_wanted_model_that_is_not_there_ends_the_process_where_that_is_asked_for(faulty):
    flags = ["--port", "0", "--grpc-port", "0", "--exit-on-error", "--model-control-mode", "explicit"]
    assert command(faulty, *flags, "--load-model", "good,nobody") == (
        2,
        "sardonyx: exit_on_error: failed to load all models: nobody",
    )


@pytest.mark.parametrize("flag", ["--port", "--grpc-port", "--metrics-port"])
def test_a_port_that_is_taken_is_told_in_one_line(controlled, flag):
    server, root = controlled
    ports = {"--port": "0", "--grpc-port": "0", flag: str(server.port)}
    code, line = command(root, *(word for pair in ports.items() for word in pair))
    assert code == 2
    field = flag.removeprefix("--").replace("-", "_")
    assert line.startswith(f"sardonyx: {field}: cannot listen on 127.0.0.1:{server.port}: ")


# Following the repositories


def test_dynamic_model_load_unload(polling):
    caller, (root, _) = polling
    place(root, "come", lambda folder: write_model(folder, "come", plus(1), config=config_text()))
    becomes(caller, "come", [("1", "READY")])
    assert answer(caller, "come") == 1
    shutil.rmtree(root / "come")
    becomes(caller, "come", [])
    assert caller.refused(lambda: answer(caller, "come")).status in NOT_FOUND
    place(root, "come", lambda folder: write_model(folder, "come", plus(2), config=config_text()))
    becomes(caller, "come", [("1", "READY")])
    assert answer(caller, "come") == 2
    assert caller.client.is_server_ready()


def test_dynamic_version_load_unload(polling):
    caller, (root, _) = polling
    config = config_text(rest=ALL_VERSIONS)
    place(root, "many", lambda folder: write_model(folder, "many", plus(1), config=config))
    becomes(caller, "many", [("1", "READY")])
    write_model(root.parent, "beside", plus(3), version=3)
    (root.parent / "beside/3").rename(root / "many/3")
    becomes(caller, "many", [("1", "READY"), ("3", "READY")])
    assert [answer(caller, "many", version) for version in ("1", "3", "")] == [1, 3, 3]
    shutil.rmtree(root / "many/1")
    becomes(caller, "many", [("1", "UNAVAILABLE", "unloaded"), ("3", "READY")])
    refusal = caller.refused(lambda: answer(caller, "many", "1"))
    assert refusal.status in NOT_READY
    assert "'many' version 1 is not at ready state" in refusal.message
    assert answer(caller, "many") == 3
    assert caller.client.get_model_metadata("many")["versions"] == ["3"]


def test_dynamic_model_modify(polling):
    caller, (root, _) = polling
    place(root, "edited", lambda folder: write_model(folder, "edited", plus(1), config=config_text(max_batch_size=2)))
    becomes(caller, "edited", [("1", "READY")])
    (root / "edited/config.pbtxt").write_text(config_text(max_batch_size=4))
    caller.server.wait_for(lambda: caller.client.get_model_config("edited")["max_batch_size"] == 4)
    (root / "edited/config.pbtxt").write_text("max_batch_size: many")
    caller.server.wait_for(lambda: "the last reload failed" in rows(caller, "edited")[0][-1])
    assert rows(caller, "edited")[0][:2] == ("1", "READY")
    assert answer(caller, "edited") == 1
    (root / "edited/config.pbtxt").write_text(config_text(max_batch_size=8))
    becomes(caller, "edited", [("1", "READY")])
    assert caller.client.get_model_config("edited")["max_batch_size"] == 8


def test_dynamic_file_delete(polling):
    """Without its config a model is completed from its graph."""
    caller, (root, _) = polling
    config = config_text(max_batch_size=7)
    place(root, "thinner", lambda folder: write_model(folder, "thinner", plus(1), config=config))
    becomes(caller, "thinner", [("1", "READY")])
    (root / "thinner/config.pbtxt").unlink()
    caller.server.wait_for(lambda: caller.client.get_model_config("thinner")["max_batch_size"] != 7)
    assert answer(caller, "thinner") == 1


def test_multiple_model_repository_polling(polling):
    caller, roots = polling
    for number, root in enumerate(roots, start=1):
        place(
            root,
            "twice",
            lambda folder, number=number: write_model(folder, "twice", plus(number), config=config_text()),
        )
        if number == 1:
            becomes(caller, "twice", [("1", "READY")])
    becomes(caller, "twice", [("1", "UNAVAILABLE", "model appears in two or more repositories")])
    assert not caller.client.is_model_ready("twice")
    assert caller.client.is_server_ready()
    shutil.rmtree(roots[0] / "twice")
    becomes(caller, "twice", [("1", "READY")])
    assert answer(caller, "twice") == 2


def test_ensembles_follow_their_parts(polling):
    caller, (root, _) = polling
    place(root, "part", lambda folder: write_model(folder, "part", plus(1), config=config_text()))
    place(root, "whole", lambda folder: write_ensemble(folder, "whole", "part", "part"))
    becomes(caller, "whole", [("1", "READY")])
    assert answer(caller, "whole") == 2
    shutil.rmtree(root / "part")
    caller.server.wait_for(lambda: rows(caller, "whole")[0][1] == "UNAVAILABLE")
    place(root, "part", lambda folder: write_model(folder, "part", plus(5), config=config_text()))
    becomes(caller, "whole", [("1", "READY")])
    assert answer(caller, "whole") == 10


# Control by clients


def test_model_control(owner, root):
    write_model(root, "a", plus(1), config=config_text())
    assert not owner.client.is_model_ready("a")
    assert owner.refused(lambda: owner.client.load_model("unknown")).status in INVALID
    owner.client.load_model("a")
    assert owner.client.is_model_ready("a")
    assert answer(owner, "a") == 1
    write_model(root, "a", plus(2), version=2)
    owner.client.load_model("a")
    assert answer(owner, "a") == 2
    owner.client.unload_model("unknown")
    owner.client.unload_model("a")
    assert not owner.client.is_model_ready("a")
    assert owner.client.is_server_ready()


def test_model_control_fail(owner, root):
    write_model(root, "a", truncated(plus(1)), config=config_text())
    refusal = owner.refused(lambda: owner.client.load_model("a"))
    assert refusal.status in INVALID
    assert "load failed for model 'a': version 1 is at UNAVAILABLE state: " in refusal.message
    assert not owner.client.is_model_ready("a")
    write_model(root, "a", plus(1))
    owner.client.load_model("a")
    assert answer(owner, "a") == 1


def test_model_control_ensemble(owner, root):
    write_model(root, "part", plus(1), config=config_text())
    write_ensemble(root, "whole", "part", "part")
    owner.client.load_model("whole")
    assert (answer(owner, "part"), answer(owner, "whole")) == (1, 2)
    owner.client.unload_model("part")
    assert rows(owner, "whole") == [("1", "UNAVAILABLE", "model part, on which it depends, was unloaded")]
    refusal = owner.refused(lambda: answer(owner, "whole"))
    assert refusal.status in NOT_READY
    owner.client.load_model("part")
    assert answer(owner, "whole") == 2
    owner.client.unload_model("whole", unload_dependents=True)
    assert rows(owner, "part") == rows(owner, "whole") == [UNLOADED]
    owner.client.load_model("whole")
    owner.client.unload_model("whole")
    assert owner.client.is_model_ready("part")
    assert rows(owner, "whole") == [UNLOADED]


def test_ensembles_in_a_circle_are_refused(owner, root):
    write_ensemble(root, "one", "two")
    write_ensemble(root, "two", "one")
    refusal = owner.refused(lambda: owner.client.load_model("one"))
    assert refusal.status in INVALID
    assert "circular dependency between ensembles: one -> two -> one" in refusal.message


def test_load_same_model_different_platform(owner, root):
    write_model(root, "part", plus(1), config=config_text())
    write_model(root, "a", plus(7), config=config_text())
    owner.client.load_model("a")
    assert owner.show("get_model_metadata", "a")["platform"] == "onnxruntime_onnx"
    assert answer(owner, "a") == 7
    (root / "a/config.pbtxt").write_text(ensemble("part", "part"))
    owner.client.load_model("a")
    assert owner.show("get_model_metadata", "a")["platform"] == "ensemble"
    assert answer(owner, "a") == 2
    (root / "a/config.pbtxt").write_text(config_text())
    owner.client.load_model("a")
    assert answer(owner, "a") == 7


def test_model_availability_on_reload(controlled, root):
    """The old version answers, and readiness is told at once, while the new one takes its time."""
    server, _ = controlled
    write_slow_to_load(root, "a", 1, version=1, seconds=0)
    with Caller("http", server) as caller, Callers(server, 1) as others:
        caller.client.load_model("a")
        write_slow_to_load(root, "a", 2, version=2, seconds=1)
        loading = others.call("grpc", lambda owner: owner.client.load_model("a"))
        num_during = 0
        while not loading.done():
            reply = answer(caller, "a", turns=0)
            assert caller.client.is_server_ready()
            assert caller.client.is_model_ready("a")
            if not loading.done():
                assert reply == 1
                num_during += 1
        loading.result()
        assert num_during > 5
        assert answer(caller, "a", turns=0) == 2
        assert rows(caller, "a") == [UNLOADED, ("2", "READY")]


def test_model_reload_fail(owner, root):
    write_model(root, "a", plus(1), config=config_text())
    owner.client.load_model("a")
    write_model(root, "a", truncated(plus(2)), version=2)
    refusal = owner.refused(lambda: owner.client.load_model("a"))
    assert refusal.status in INVALID
    assert "load failed for model 'a': version 2 is at UNAVAILABLE state: model.onnx" in refusal.message
    ((version, state, reason),) = rows(owner, "a")
    assert (version, state) == ("1", "READY")
    assert reason.startswith("version 1 serves; the last reload failed: model.onnx")
    assert answer(owner, "a") == 1
    assert owner.client.is_server_ready()


def test_model_repository_index(owner, root):
    for name in ("never", "gone", "here"):
        write_model(root, name, plus(1), config=config_text())
    write_model(root, "broken", truncated(plus(1)), config=config_text())
    for name in ("gone", "here"):
        owner.client.load_model(name)
    owner.client.unload_model("gone")
    owner.refused(lambda: owner.client.load_model("broken"))
    assert {name: rows(owner, name) for name in ("never", "gone", "here", "nobody")} == {
        "never": [()],
        "gone": [UNLOADED],
        "here": [("1", "READY")],
        "nobody": [],
    }
    ((version, state, reason),) = rows(owner, "broken")
    assert (version, state) == ("1", "UNAVAILABLE")
    assert reason


def test_config_override(owner, root):
    write_model(root, "a", plus(1), config=config_text(max_batch_size=4))
    write_model(root, "a", plus(2), version=2)

    def versions():
        return owner.show("get_model_metadata", "a")["versions"]

    for config in ("[]", '{"max_batch_size": "many"}', '{"platform": "tensorrt_plan"}'):
        refusal = owner.refused(lambda config=config: owner.client.load_model("a", config=config))
        assert refusal.status in INVALID
        assert "failed to load 'a', failed to poll from model repository" in refusal.message
        assert not owner.client.is_model_ready("a")
    owner.client.load_model("a", config='{"max_batch_size": 4, "version_policy": {"specific": {"versions": ["1"]}}}')
    assert versions() == ["1"]
    owner.client.load_model("a")
    assert versions() == ["1"]  # nothing changed, so it is kept
    (root / "a/config.pbtxt").write_text(config_text(max_batch_size=2))
    owner.client.load_model("a")
    assert versions() == ["2"]


def test_file_override(owner, root):
    write_model(root, "a", plus(1), config=config_text())
    brought = {"file:1/model.onnx": serialize(plus(5))}
    refusal = owner.refused(lambda: owner.client.load_model("a", files=brought))
    assert "failed to load 'a', failed to poll from model repository" in refusal.message
    assert not owner.client.is_model_ready("a")
    owner.client.load_model("a")
    assert answer(owner, "a") == 1
    owner.client.load_model("new", config='{"max_batch_size": 8}', files=brought)
    assert answer(owner, "new") == 5
    assert answer(owner, "a") == 1
    owner.client.load_model("a", config='{"max_batch_size": 8}', files=brought)
    assert answer(owner, "a") == 5
    owner.client.unload_model("a")
    owner.client.load_model("a")
    assert answer(owner, "a") == 1
    owner.client.unload_model("new")
    assert rows(owner, "new") == []


def test_file_override_security(owner, root, tmp_path):
    write_model(root, "a", plus(1), config=config_text())
    owner.client.load_model("a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "existing").write_text("precious")
    (root / "a/linked").symlink_to(outside)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for path in (
        f"../../{outside.name}/existing",
        f"{outside}/existing",
        f"{outside}/new",
        "../config.pbtxt",
        "1/../../a/config.pbtxt",
        "../linked/existing",
        "1/../linked/existing",
        "../new/1/model.onnx",
        "config.pbtxt",
        "",
    ):
        files = {"file:1/model.onnx": serialize(plus(5)), f"file:{path}": b"evil"}
        refusal = owner.refused(lambda files=files: owner.client.load_model("a", config="{}", files=files))
        assert refusal.status in INVALID
        assert "failed to load 'a'" in refusal.message
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    assert [path.name for path in outside.iterdir()] == ["existing"]
    assert (outside / "existing").read_text() == "precious"
    assert answer(owner, "a") == 1


def test_broken_files_do_not_end_the_process(controlled, root):
    server, _ = controlled
    write_model(root, "a", plus(1), config=config_text())
    whole = serialize(plus(5))
    random = Random(7)
    with Caller("http", server) as caller:
        caller.client.load_model("a")
        for _ in range(60):
            data = bytearray(whole[: random.choice([len(whole), random.randrange(len(whole))])])
            for _ in range(random.randint(1, 4)):
                data[random.randrange(len(data))] ^= 1 << random.randrange(8)
            with contextlib.suppress(InferenceServerException):
                caller.client.load_model("broken", config="{}", files={"file:1/model.onnx": bytes(data)})
        assert answer(caller, "a") == 1
        caller.client.unload_model("broken")
        assert caller.client.is_server_ready()


def test_load_new_model_version(controlled, root):
    """Requests go on while versions are added one by one; each is used once its load has returned."""
    server, _ = controlled
    write_model(root, "a", plus(1), config=config_text(rest=ALL_VERSIONS))
    with Caller("grpc", server) as caller, Callers(server, 1) as others:
        caller.client.load_model("a")
        is_over = threading.Event()

        def ask(client):
            replies = []
            while not is_over.is_set():
                replies.append((answer(client, "a"), answer(client, "a", "1")))
            return replies

        asking = others.call("http", ask)
        for version in range(2, 6):
            write_model(root, "a", plus(version), version=version)
            caller.client.load_model("a")
            assert answer(caller, "a") == version
        is_over.set()
        newest, first = zip(*asking.result(), strict=True)
        assert list(newest) == sorted(newest)
        assert set(first) == {1}
        assert rows(caller, "a") == [(str(version), "READY") for version in range(1, 6)]


def test_concurrent_model_load_unload(controlled, root):
    server, _ = controlled
    names = [f"m{number}" for number in range(4)]
    for number, name in enumerate(names):
        write_slow_to_load(root, name, number, version=1, seconds=0.1)
    with Caller("http", server) as caller, Callers(server, len(names)) as others:
        for _ in range(2):
            loads = [
                others.call("http" if number % 2 else "grpc", lambda owner, name=name: owner.client.load_model(name))
                for number, name in enumerate(names)
            ]
            for load in loads:
                load.result()
            assert [answer(caller, name, turns=0) for name in names] == list(range(4))
            for unload in [
                others.call("grpc", lambda owner, name=name: owner.client.unload_model(name)) for name in names
            ]:
                unload.result()
            assert [rows(caller, name) for name in names] == [[UNLOADED]] * 4


def test_concurrent_same_model_load_unload_stress(controlled, root):
    """Only what can be said of a model that others take away is said, and the server is none the worse."""
    server, _ = controlled
    write_model(root, "a", plus(1), config=config_text())
    num_threads, num_turns = 8, 32

    def stress(client):
        messages = set()
        for _ in range(num_turns):
            client.client.load_model("a")
            try:
                assert answer(client, "a") == 1
            except Exception as error:
                messages.add(str(error).partition("] ")[2].partition(": unload")[0])
            client.client.unload_model("a")
        return messages

    with Caller("http", server) as caller, Callers(server, num_threads) as others:
        threads = [others.call("http" if number % 2 else "grpc", stress) for number in range(num_threads)]
        said = set().union(*(thread.result() for thread in threads))
        allowed = {"Request for unknown model: 'a' has no available versions"}
        assert {message for message in said if "has stopped accepting" not in message} <= allowed
        assert caller.client.is_server_live()
        assert caller.client.is_server_ready()
        caller.client.load_model("a")
        assert answer(caller, "a") == 1


def test_no_request_fails_while_a_model_is_reloaded_again_and_again(controlled, root):
    server, _ = controlled
    write_model(root, "part", plus(0), config=config_text())
    write_ensemble(root, "whole", "part", "part")
    is_over = threading.Event()

    def ask(client):
        replies = []
        while not is_over.is_set():
            replies.append((answer(client, "part"), answer(client, "whole")))
        return replies

    with Caller("http", server) as caller, Callers(server, 2) as others:
        caller.client.load_model("whole")
        clients = [others.call(protocol, ask) for protocol in ("http", "grpc")]
        try:
            for number in range(1, 51):
                write_model(root, "part", plus(number))
                caller.client.load_model("part")
        finally:
            is_over.set()
        for client in clients:
            for replies in zip(*client.result(), strict=True):
                assert list(replies) == sorted(replies)
                assert len(set(replies)) > 5


# The end


def shut_down(server, model, work, *, protocol="http"):
    """Signal with 6 requests queued: all complete, new ones are refused, and the process ends well."""
    with Callers(server, 6) as callers:
        calls = [callers.call(protocol, lambda client, number=number: work(client, number)) for number in range(6)]
        server.wait_for(lambda: pending(server, model) == 6)
        server.signal(signal.SIGTERM)
        server.wait_for(lambda: server.request("GET", "/ready")[0] == 503)
        for other in ("http", "grpc"):
            with Caller(other, server) as late:
                refusal = late.refused(lambda late=late: work(late, 0))
                assert refusal.status in NOT_READY
                assert "the server is shutting down" in refusal.message
        assert [call.result() for call in calls] == [A_WHILE + number for number in range(6)]
    assert server.wait() == 0
    assert "Traceback" not in server.log()


def test_shutdown_dynamic(tmp_path):
    root = tmp_path / "repository"
    write_model(root, "slow", slow(), config=config_text(max_batch_size=1, rest=ONE_AT_A_TIME))
    with serve(root, tmp_path / "log", "--drain-grace-s", "0") as server:
        shut_down(server, "slow", lambda client, number: turn(client, "slow", A_WHILE + number))


def test_shutdown_sequence(tmp_path):
    root = tmp_path / "repository"
    batching = "sequence_batching { max_sequence_idle_microseconds: 60000000 }\ninstance_group { count: 1 }"
    write_model(root, "slow", slow(), config=config_text(max_batch_size=1, rest=batching))

    def work(client, number):
        flags = {"sequence_id": number + 1, "sequence_start": True, "sequence_end": True}
        return turn(client, "slow", A_WHILE + number, **flags)

    with serve(root, tmp_path / "log", "--drain-grace-s", "0") as server:
        shut_down(server, "slow", work, protocol="grpc")


def test_shutdown_ensemble(tmp_path):
    root = tmp_path / "repository"
    write_model(root, "slow", slow(), config=config_text(max_batch_size=1, rest=ONE_AT_A_TIME))
    config = ensemble("slow", "slow").replace("INT32", "INT64").replace("INPUT0", "INPUT")
    write_ensemble(root, "whole", "slow")
    (root / "whole/config.pbtxt").write_text(
        config.replace("OUTPUT0", "OUTPUT").replace("batch_size: 8", "batch_size: 1")
    )
    with serve(root, tmp_path / "log", "--drain-grace-s", "0") as server:
        shut_down(server, "whole", lambda client, number: turn(client, "whole", A_WHILE + number))


def test_shutdown_while_loading(tmp_path):
    root = tmp_path / "repository"
    write_slow_to_load(root, "a", 1, version=1, seconds=0.5)
    with serve(root, tmp_path / "log", *EXPLICIT, "--drain-grace-s", "0") as server, Callers(server, 1) as callers:
        loading = callers.call("http", lambda client: client.refused(lambda: client.client.load_model("a")))
        with Caller("http", server) as caller:
            server.wait_for(lambda: rows(caller, "a") == [("1", "LOADING")])
        server.signal(signal.SIGTERM)
        assert loading.result().status in NOT_READY
        assert server.wait() == 0
        assert "Traceback" not in server.log()
        assert "cannot be loaded" not in server.log()


def test_shutdown_while_unloading(tmp_path):
    root = tmp_path / "repository"
    write_model(root, "slow", slow(), config=config_text(max_batch_size=1, rest=ONE_AT_A_TIME))
    flags = [*EXPLICIT, "--load-model", "slow", "--drain-grace-s", "0"]
    with serve(root, tmp_path / "log", *flags) as server, Callers(server, 2) as callers:
        call = callers.call("grpc", lambda client: turn(client, "slow", 5 * A_WHILE))
        server.wait_for(lambda: pending(server, "slow") == 1)
        unloading = callers.call("http", lambda client: client.client.unload_model("slow"))
        with Caller("http", server) as caller:
            server.wait_for(lambda: rows(caller, "slow") == [("1", "UNLOADING")])
        server.signal(signal.SIGTERM)
        assert call.result() == 5 * A_WHILE
        unloading.result()
        assert server.wait() == 0


def test_shutdown_with_live_connection(tmp_path):
    root = tmp_path / "repository"
    write_model(root, "a", plus(1), config=config_text())
    with serve(root, tmp_path / "log", "--drain-grace-s", "0") as server:
        idle = server.connect()
        with idle, Caller("http", server) as http, Caller("grpc", server) as grpc:
            assert answer(http, "a") == answer(grpc, "a") == 1
            server.signal(signal.SIGTERM)
            assert server.wait() == 0
            assert idle.recv(1) == b""
