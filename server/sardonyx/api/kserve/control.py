"""The endpoints that change the server: repository, trace and log settings, shared memory.

Floor 5.

Source: Triton, docs/protocol/extension_model_repository.md, extension_trace.md, extension_logging.md and
extension_shared_memory.md.
"""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import msgspec

from sardonyx.api.kserve.exchange import JSON_TYPE, Exchange, Reply, json_reply, off_loop
from sardonyx.api.kserve.service import InferenceService
from sardonyx.errors import InvalidRequest, UnsupportedFeature

_FILE = "file:"


class IndexRequest(msgspec.Struct, frozen=True):
    """Body of ``index``."""

    ready: bool = False


class ControlRequest(msgspec.Struct, frozen=True):
    """Body of ``load`` and ``unload``."""

    parameters: dict[str, bool | int | float | str | None] = {}


class RegisterRequest(msgspec.Struct, frozen=True):
    """Body of ``register``."""

    key: str
    byte_size: int
    offset: int = 0


_INDEX = msgspec.json.Decoder(IndexRequest)
_CONTROL = msgspec.json.Decoder(ControlRequest)
_REGISTER = msgspec.json.Decoder(RegisterRequest | None)
_TRACE = msgspec.json.Decoder(dict[str, str | list[str] | None])
_LOG = msgspec.json.Decoder(dict[str, bool | int | float | str | None])
_EMPTY_LIST = Reply(b"[]", headers=(JSON_TYPE,))


class Control:
    """The endpoints of the control plane."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def index(self, exchange: Exchange) -> Reply:
        """Every model of the repositories."""
        _refuse_repository(exchange)
        request = await exchange.read_json(_INDEX, IndexRequest())
        return json_reply(await self._service.index(ready=request.ready))

    async def load(self, exchange: Exchange) -> Reply:
        """Load or reload a model; answered when it is done."""
        _refuse_repository(exchange)
        request = await exchange.read_json(_CONTROL, ControlRequest())
        values = request.parameters
        size = sum(len(value) for value in values.values() if isinstance(value, str))
        parameters = await off_loop(size, lambda: _load_parameters(values))
        await self._service.load(exchange.model, parameters)
        return Reply()

    async def unload(self, exchange: Exchange) -> Reply:
        """Unload a model; answered when it is done."""
        _refuse_repository(exchange)
        request = await exchange.read_json(_CONTROL, ControlRequest())
        with_dependents = request.parameters.get("unload_dependents", False)
        if not isinstance(with_dependents, bool):
            raise InvalidRequest("Unable to parse 'unload_dependents': attempt to access JSON non-boolean as boolean")
        await self._service.unload(exchange.model, unload_dependents=with_dependents)
        return Reply()

    async def trace_settings(self, exchange: Exchange) -> Reply:
        """Show the trace settings, or change some of them."""
        if exchange.method == "GET":
            return json_reply(self._service.trace_settings(exchange.model))
        changes = await exchange.read_json(_TRACE, {})
        as_lists = {name: [value] if isinstance(value, str) else value for name, value in changes.items()}
        return json_reply(self._service.update_trace_settings(as_lists, exchange.model))

    async def log_settings(self, exchange: Exchange) -> Reply:
        """Show the log settings, or change some of them."""
        if exchange.method == "GET":
            return json_reply(self._service.log_settings())
        changes: dict[str, Any] = await exchange.read_json(_LOG, {})
        return json_reply(self._service.update_log_settings(changes))

    async def system_memory_status(self, exchange: Exchange) -> Reply:
        """The registered regions, or one of them."""
        return json_reply(self._service.shared_memory_status(exchange.arguments.get("region", "")))

    async def register_system_memory(self, exchange: Exchange) -> Reply:
        """Make a region of the machine's shared memory known."""
        request = await exchange.read_json(_REGISTER, None)
        if request is None:
            raise InvalidRequest("'key' and 'byte_size' are required")
        self._service.register_shared_memory(
            exchange.arguments["region"], key=request.key, offset=request.offset, byte_size=request.byte_size
        )
        return Reply()

    async def unregister_system_memory(self, exchange: Exchange) -> Reply:
        """Forget one region, or all."""
        self._service.unregister_shared_memory(exchange.arguments.get("region", ""))
        return Reply()

    async def cuda_memory_status(self, exchange: Exchange) -> Reply:
        """There are none."""
        if region := exchange.arguments.get("region"):
            raise InvalidRequest(f"Unable to find cuda shared memory region: '{region}'")
        return _EMPTY_LIST

    async def register_cuda_memory(self, exchange: Exchange) -> Reply:
        """Refused."""
        self._service.refuse_cuda_shared_memory()
        raise AssertionError("it was not refused")

    async def unregister_cuda_memory(self, exchange: Exchange) -> Reply:
        """There is nothing to forget, which is no error: client programs do it before they begin."""
        return Reply()


def _refuse_repository(exchange: Exchange) -> None:
    if "repository" in exchange.arguments:
        raise UnsupportedFeature("'repository_name' specification is not supported")


def _load_parameters(values: Mapping[str, object]) -> dict[str, str | bytes]:
    """Files decoded from base64, all else as it is."""
    parameters: dict[str, str | bytes] = {}
    for name, value in values.items():
        if not isinstance(value, str):
            raise InvalidRequest(
                f"Unrecognized load parameter '{name}' with type '{type(value).__name__}': it must be a string",
                param=name,
            )
        parameters[name] = _decode_file(name, value) if name.startswith(_FILE) else value
    return parameters


def _decode_file(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"load parameter '{name}' is not base64", param=name) from None
