import logging
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.kserve.calls import LogSettings, TraceSettings
from sardonyx.api.kserve.server_settings import ServerLog, ServerTrace
from sardonyx.errors import InvalidRequest, UnsupportedFeature


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Ours, at INFO; as it was afterwards."""
    logger = logging.getLogger("sardonyx")
    before = logger.level
    logger.setLevel(logging.INFO)
    yield logger
    logger.setLevel(before)


# Trace ----------------------------------------------------------------------------------------------------------------


def test_trace_settings_begin_as_tritons_do():
    assert ServerTrace().settings() == TraceSettings(
        trace_level=["OFF"], trace_rate="1000", trace_count="-1", log_frequency="0", trace_file="", trace_mode="triton"
    )


def test_model_has_the_global_settings_but_for_its_own():
    trace = ServerTrace()
    assert trace.update({"trace_rate": ["5"]}, "m").trace_rate == "5"
    assert trace.update({"trace_rate": ["7"], "trace_level": ["TIMESTAMPS", "TENSORS"]}).trace_rate == "7"
    assert (trace.settings("m").trace_rate, trace.settings("m").trace_level) == ("5", ["TIMESTAMPS", "TENSORS"])
    assert trace.settings("other") == trace.settings()


def test_clearing_goes_back_to_the_global_or_the_initial_value():
    trace = ServerTrace()
    trace.update({"trace_rate": ["7"]})
    trace.update({"trace_rate": ["5"]}, "m")
    assert trace.update({"trace_rate": None}, "m").trace_rate == "7"
    assert trace.update({"trace_rate": None}).trace_rate == "1000"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"trace_file": ["/etc/passwd"]}, UnsupportedFeature, "trace file location can not be updated"),
        ({"trace_file": None}, UnsupportedFeature, "trace file location can not be updated"),
        ({"trace_file": ["a", "b"]}, UnsupportedFeature, "trace file location can not be updated"),
        ({"trace_speed": ["1"]}, InvalidRequest, "Unknown trace setting 'trace_speed'"),
        ({"trace_speed": ["1", "2"]}, InvalidRequest, "Unknown trace setting 'trace_speed'"),
        ({"trace_rate": ["1", "2"]}, InvalidRequest, "expect only 1 value for 'trace_rate'"),
        ({"trace_rate": []}, InvalidRequest, "expect only 1 value for 'trace_rate'"),
        ({"trace_rate": ["0"]}, InvalidRequest, "trace_rate: expected a whole number from 1, not '0'"),
        ({"trace_rate": ["--5"]}, InvalidRequest, "trace_rate: expected a whole number"),
        ({"trace_rate": ["9" * 5000]}, InvalidRequest, "trace_rate: expected a whole number"),
        ({"trace_rate": ["\uff15"]}, InvalidRequest, "trace_rate: expected a whole number"),
        ({"trace_rate": [str(1 << 31)]}, InvalidRequest, "trace_rate: expected a whole number"),
        ({"trace_count": ["-2"]}, InvalidRequest, "trace_count: expected a whole number from -1"),
        ({"log_frequency": ["often"]}, InvalidRequest, "log_frequency: expected a whole number from 0"),
        ({"trace_level": ["LOUD"]}, InvalidRequest, "trace_level: expected some of OFF, TENSORS, TIMESTAMPS"),
        ({"trace_level": []}, InvalidRequest, "trace_level: expected some of"),
        ({"trace_mode": ["zipkin"]}, InvalidRequest, "trace_mode: expected triton or opentelemetry"),
    ],
)
def test_bad_trace_settings_change_nothing(changes: dict[str, Any], error: type[Exception], match: str):
    trace = ServerTrace()
    for name in ("", "m"):
        with pytest.raises(error, match=match):
            trace.update({"trace_count": ["9"], **changes, "log_frequency": changes.get("log_frequency", ["9"])}, name)
        assert trace.settings(name) == TraceSettings()


@given(
    st.dictionaries(
        st.sampled_from(TraceSettings.__struct_fields__) | st.text(max_size=5),
        st.none() | st.lists(st.text(max_size=12) | st.sampled_from(["1", "OFF", "triton", "-1"]), max_size=2),
    )
)
def test_any_trace_settings_are_taken_or_refused(changes: dict[str, list[str] | None]):
    trace = ServerTrace()
    try:
        after = trace.update(changes)
    except (InvalidRequest, UnsupportedFeature):
        assert trace.settings() == TraceSettings()
    else:
        for name, values in changes.items():
            if values is not None:
                assert getattr(after, name) == (values if name == "trace_level" else values[0])


# Log ------------------------------------------------------------------------------------------------------------------


def test_log_settings_begin_as_the_process_logs(logger: logging.Logger):
    assert ServerLog().settings() == LogSettings()
    logger.setLevel(logging.ERROR)
    assert ServerLog().settings() == LogSettings(log_info=False, log_warning=False)
    logger.setLevel(logging.DEBUG)
    assert ServerLog().settings() == LogSettings(log_verbose_level=1)


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"log_info": False}, logging.WARNING),
        ({"log_info": False, "log_warning": False}, logging.ERROR),
        ({"log_info": False, "log_warning": False, "log_error": False}, logging.CRITICAL),
        ({"log_verbose_level": 1}, logging.DEBUG),
        ({"log_warning": False}, logging.INFO),
        ({"log_format": "ISO8601"}, logging.INFO),
        ({}, logging.INFO),
    ],
)
def test_log_settings_move_the_level(logger: logging.Logger, changes: dict[str, Any], level: int):
    log = ServerLog()
    after = log.update(changes)
    assert logger.level == level
    assert after == log.settings()
    assert all(getattr(after, name) == value for name, value in changes.items())


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"log_file": "/etc/cron.d/x"}, UnsupportedFeature, "log file location can not be updated"),
        ({"log_file": ""}, UnsupportedFeature, "log file location can not be updated"),
        ({"log_info": 0}, InvalidRequest, "log_info: expected true or false"),
        ({"log_error": "no"}, InvalidRequest, "log_error: expected true or false"),
        ({"log_verbose_level": -1}, InvalidRequest, "log_verbose_level: expected a whole number from 0"),
        ({"log_verbose_level": True}, InvalidRequest, "log_verbose_level: expected a whole number from 0"),
        ({"log_verbose_level": 1 << 31}, InvalidRequest, "log_verbose_level: expected a whole number from 0"),
        ({"log_format": "xml"}, InvalidRequest, "log_format: expected default or ISO8601"),
        ({"log_format": ["default"]}, InvalidRequest, "log_format: expected default or ISO8601"),
        ({"log_format": {}}, InvalidRequest, "log_format: expected default or ISO8601"),
        ({"log_colour": True}, InvalidRequest, "Unknown log setting 'log_colour'"),
    ],
)
def test_bad_log_settings_change_nothing(
    logger: logging.Logger, changes: dict[str, Any], error: type[Exception], match: str
):
    log = ServerLog()
    with pytest.raises(error, match=match):
        log.update({"log_warning": False, **changes})
    assert log.settings() == LogSettings()
    assert logger.level == logging.INFO
