"""Triton's log and trace settings, as far as this server has them.

Floor 5. No file can be named over the network: what a caller could append to would be a way to write anywhere
(CVE-2024-0087).
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from sardonyx.api.kserve.calls import LogSettings, TraceSettings
from sardonyx.errors import InvalidRequest, UnsupportedFeature

_LEVELS = frozenset({"OFF", "TIMESTAMPS", "TENSORS"})
_NUMBERS = {"trace_rate": 1, "trace_count": -1, "log_frequency": 0}
"""Settings that are numbers, with the lowest."""
_NUMBER = re.compile(r"-?[0-9]{1,10}")
_LEVEL_SWITCHES = {"log_error": logging.ERROR, "log_warning": logging.WARNING, "log_info": logging.INFO}


class ServerTrace:
    """Trace settings, global and by model. They are kept and told; no traces are written."""

    def __init__(self) -> None:
        self._initial = TraceSettings()
        self._global = self._initial
        self._models: dict[str, dict[str, Any]] = {}

    def settings(self, name: str = "") -> TraceSettings:
        """The global ones, or a model's, which are the global ones where it has none of its own."""
        return msgspec.structs.replace(self._global, **self._models.get(name, {}))

    def update(self, changes: Mapping[str, list[str] | None], name: str = "") -> TraceSettings:
        """Change some, all of them or none.

        Args:
            changes: texts by setting; ``None`` goes back to the global or the initial value.
            name: of a model; empty: the global ones.

        Raises:
            InvalidRequest: an unknown setting or a bad value.
            UnsupportedFeature: the trace file.
        """
        if "trace_file" in changes:
            raise UnsupportedFeature("trace file location can not be updated through network protocol")
        for key in changes.keys() - set(TraceSettings.__struct_fields__):
            raise InvalidRequest(f"Unknown trace setting '{key[:80]}'", param=key[:80])
        values = {key: None if texts is None else _trace_value(key, texts) for key, texts in changes.items()}
        if name:
            own = self._models.setdefault(name, {})
            for key, value in values.items():
                own.pop(key, None)
                if value is not None:
                    own[key] = value
        else:
            reset = {key: getattr(self._initial, key) if value is None else value for key, value in values.items()}
            self._global = msgspec.structs.replace(self._global, **reset)
        return self.settings(name)


class ServerLog:
    """Log settings: switches on the process's own log levels."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("sardonyx")
        level = self._logger.getEffectiveLevel()
        self._settings = LogSettings(
            log_error=level <= logging.ERROR,
            log_warning=level <= logging.WARNING,
            log_info=level <= logging.INFO,
            log_verbose_level=int(level <= logging.DEBUG),
        )

    def settings(self) -> LogSettings:
        """As they are."""
        return self._settings

    def update(self, changes: Mapping[str, Any]) -> LogSettings:
        """Change some, all of them or none. A level that is on has every more severe one on.

        Raises:
            InvalidRequest: an unknown setting or a value of the wrong type.
            UnsupportedFeature: the log file.
        """
        for key, value in changes.items():
            _check_log_value(key, value)
        self._settings = msgspec.structs.replace(self._settings, **changes)
        wanted = [number for name, number in _LEVEL_SWITCHES.items() if getattr(self._settings, name)]
        if self._settings.log_verbose_level:
            wanted.append(logging.DEBUG)
        self._logger.setLevel(min(wanted, default=logging.CRITICAL))
        return self._settings


def _trace_value(key: str, texts: list[str]) -> Any:
    if key == "trace_level":
        if not texts or not _LEVELS.issuperset(texts):
            raise InvalidRequest(f"trace_level: expected some of {', '.join(sorted(_LEVELS))}", param=key)
        return list(texts)
    if len(texts) != 1:
        raise InvalidRequest(f"expect only 1 value for '{key}'", param=key)
    text = texts[0]
    if key in _NUMBERS and not (_NUMBER.fullmatch(text) and _NUMBERS[key] <= int(text) < 1 << 31):
        raise InvalidRequest(f"{key}: expected a whole number from {_NUMBERS[key]}, not '{text[:40]}'", param=key)
    if key == "trace_mode" and text not in {"triton", "opentelemetry"}:
        raise InvalidRequest("trace_mode: expected triton or opentelemetry", param=key)
    return text


def _check_log_value(key: str, value: Any) -> None:
    if key == "log_file":
        raise UnsupportedFeature("log file location can not be updated through network protocol")
    if key in _LEVEL_SWITCHES:
        if not isinstance(value, bool):
            raise InvalidRequest(f"{key}: expected true or false", param=key)
    elif key == "log_verbose_level":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise InvalidRequest("log_verbose_level: expected a whole number from 0", param=key)
    elif key == "log_format":
        if value not in ("default", "ISO8601"):  # a value without hash is no text either
            raise InvalidRequest("log_format: expected default or ISO8601", param=key)
    else:
        raise InvalidRequest(f"Unknown log setting '{key[:80]}'", param=key[:80])
