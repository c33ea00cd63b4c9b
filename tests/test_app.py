import asyncio
import json
import logging
import shlex
import sys
import threading
from types import SimpleNamespace

import pytest

from sardonyx.app import _JsonFormatter, _LineFormatter, _running, check_startup_models, example_command
from sardonyx.errors import ConfigError
from sardonyx.metrics import Metrics
from sardonyx.settings import Settings


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    try:
        raise KeyError("why")
    except KeyError:
        failure = sys.exc_info() if extra.pop("fails", False) else None
    made = logging.LogRecord("sardonyx.x", logging.WARNING, "x.py", 1, message, arguments, failure)
    vars(made).update(extra)
    return made


def test_a_logged_value_cannot_begin_a_line_of_its_own():
    line = _LineFormatter().format(record("unknown model %s", "a\r\n2026-01-01 INFO all is well"))
    assert len(line.splitlines()) == 1
    assert line.endswith("unknown model a\\r\\n2026-01-01 INFO all is well")


def test_a_cause_is_logged_on_lines_of_its_own():
    assert "KeyError: 'why'" in _LineFormatter().format(record("it failed", fails=True)).splitlines()[-1]


def test_a_line_for_machines_is_one_json_object_with_its_fields():
    fields = json.loads(
        _JsonFormatter().format(record("ended: %s", "x\n", request_id="cmpl-1", odd={1, 2}, fails=True))
    )
    assert fields["message"] == "ended: x\n"
    assert fields["level"] == "warning"
    assert fields["logger"] == "sardonyx.x"
    assert fields["request_id"] == "cmpl-1"
    assert sorted(fields["odd"]) == [1, 2]
    assert "KeyError" in fields["exception"]


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("::1", "[::1]"),
        ("box.local", "box.local"),
    ],
)
def test_the_example_reaches_the_server_from_its_own_machine(host, shown):
    words = shlex.split(example_command(Settings(host=host, port=81), has_chat_template=True))
    assert words[1] == f"http://{shown}:81/v1/chat/completions"
    assert json.loads(words[-1])["messages"]


def test_the_example_asks_for_what_the_server_needs():
    words = shlex.split(example_command(Settings(api_keys=("sk-secret",)), has_chat_template=False))
    assert "Authorization: Bearer YOUR_KEY" in words
    assert words[1].endswith("/v1/completions")
    assert "sk-secret" not in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_model": ("a",)}, "is for model_control_mode explicit"),
        ({"load_model": ("a",), "model_control_mode": "poll"}, "is for model_control_mode explicit"),
        ({"load_model": ("*", "a"), "model_control_mode": "explicit"}, r"is either \* alone"),
    ],
)
def test_models_of_the_start_that_would_not_be_loaded_are_refused(options, message):
    with pytest.raises(ConfigError, match=f"load_model: {message}"):
        check_startup_models(Settings(**options))


@pytest.mark.parametrize("names", [(), ("*",), ("a", "b")])
def test_models_of_the_start_may_be_all_some_or_none(names):
    check_startup_models(Settings(load_model=names, model_control_mode="explicit"))


def test_loads_leave_threads_for_requests():
    settings = Settings(allow_grpc=False, model_load_thread_count=64)
    is_over = threading.Event()

    class SlowRegistry:
        async def start(self, names):
            await asyncio.gather(*(asyncio.to_thread(is_over.wait) for _ in range(64)))

        async def close(self):
            is_over.set()

    async def test():
        service = SimpleNamespace(close=lambda: None)
        async with _running(settings, SlowRegistry(), Metrics("test"), service, None, None):
            await asyncio.sleep(0)  # the loads begin
            try:
                assert await asyncio.wait_for(asyncio.to_thread(lambda: 1), 5.0) == 1
            finally:
                is_over.set()

    asyncio.run(test())
