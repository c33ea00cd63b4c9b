"""One HTTP/2 stream: bytes in, messages out, within what both sides have room for.

Floor 5. Knows frames and flow control; what a message means and who answers it, `call.Call` knows.

Source: RFC 9113, sections 5.1 (states), 5.2 and 6.9 (flow control), 8.1 (order of frames); gRPC over HTTP/2 (grpc/grpc,
doc/PROTOCOL-HTTP2.md).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from sardonyx.api.kserve.h2 import answers
from sardonyx.api.kserve.h2.frames import (
    DATA,
    DEFAULT_FRAME_BYTES,
    END_HEADERS,
    END_STREAM,
    HEADER,
    HEADERS,
    ErrorCode,
    StreamFault,
    frame,
    rst_stream,
    window_update,
)
from sardonyx.api.kserve.h2.intake import WINDOW_BYTES, Intake
from sardonyx.api.kserve.h2.messages import PREFIX_BYTES, Buffer, Inbox
from sardonyx.errors import PayloadTooLarge, ServeError

if TYPE_CHECKING:
    from sardonyx.api.kserve.h2.call import Call
    from sardonyx.api.kserve.h2.connection import Connection
    from sardonyx.api.kserve.h2.heads import Head

ROOM_TIMEOUT_S = 300.0
"""For a client that lives and gives no room: what waits for it takes memory."""
MAX_TURN_BYTES = 1 << 20
"""Of one message, before other streams get a word in."""
MAX_TURN_MESSAGES = 8
"""Of one stream, before anything else does: a method may have the next one ready at once, for ever."""


class Stream:
    """One stream, from its HEADERS on.

    Args:
        connection: carries it.
        intake: of the connection.
        id: its number.
        head: what it began with.
    """

    __slots__ = (
        "_connection",
        "_has_headers",
        "_inbox",
        "_intake",
        "_is_inside_message",
        "_num_received",
        "_num_sent",
        "_receive_window",
        "_waiter",
        "call",
        "head",
        "id",
        "is_ended",
        "is_half_closed",
        "send_window",
    )

    call: Call
    """Told of messages and of the end."""

    def __init__(self, connection: Connection, intake: Intake, id: int, head: Head) -> None:
        self._connection = connection
        self._intake = intake
        self.id = id
        self.head = head
        self.send_window = connection.initial_send_window
        self.is_half_closed = False
        """The client sends no more."""
        self.is_ended = False
        """We send no more."""
        self._receive_window = WINDOW_BYTES
        self._inbox: Inbox | None = None
        self._num_received = 0
        self._num_sent = 0
        self._has_headers = False
        self._is_inside_message = False
        self._waiter: asyncio.Future[None] | None = None

    def receive(self, data: bytes, begin: int, end: int, is_last: bool) -> None:
        """Take a part of `data` that `charge` was called for.

        Raises:
            StreamFault: the body is not as long as was said.
        """
        if self.is_ended:
            return
        size = end - begin
        self._num_received += size
        if is_last:
            self.is_half_closed = True
            if self.head.content_length not in (None, self._num_received):
                raise StreamFault(ErrorCode.PROTOCOL_ERROR)
            if (
                self._inbox is None
                and not self.call.is_streaming
                and size >= PREFIX_BYTES
                and not data[begin]
                and int.from_bytes(data[begin + 1 : begin + PREFIX_BYTES], "big") == size - PREFIX_BYTES
                and size - PREFIX_BYTES <= self._intake.max_message_bytes
            ):
                # A whole call in one frame, as most are.
                self.call.begin(data[begin + PREFIX_BYTES : end])
                return
        try:
            self._keep(data, begin, end)
        except ServeError as error:
            self.call.fail(error)
        else:
            self.call.notice()

    def _keep(self, data: bytes, begin: int, end: int) -> None:
        inbox = self._inbox
        if inbox is None:
            inbox = self._inbox = Inbox(self._intake.max_message_bytes)
        had_message = inbox.has_message
        self._intake.held_bytes += end - begin
        inbox.push(data, begin, end)
        if inbox.has_message:
            self._intake.num_readable += not had_message
        elif not self.is_half_closed:
            # It must go on, whatever its length; for many such at once there is a limit.
            if self._intake.holds_too_much:
                raise PayloadTooLarge("too many unfinished messages on one connection")
            self._credit(self._receive_window)

    def charge(self, size: int) -> None:
        """Count the payload of a DATA frame.

        Raises:
            StreamFault: there was no room for it.
        """
        self._receive_window -= size
        if self._receive_window < 0:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR)

    def take(self) -> tuple[bool, bytes] | None:
        """The next message and whether it is compressed; ``None`` while it is not whole.

        Raises:
            PayloadTooLarge: it is too large.
            InvalidRequest: it is none.
        """
        inbox = self._inbox
        if inbox is None:
            return None
        before = inbox.size
        self._intake.num_readable -= inbox.has_message
        try:
            return inbox.pop()
        finally:
            self._intake.num_readable += inbox.has_message
            self._intake.held_bytes -= before - inbox.size
            self._intake.credit()
            self._credit(self._receive_window + (inbox.size if inbox.has_message else 0))

    @property
    def has_rest(self) -> bool:
        """Whether something was received that no message was made of."""
        return self._inbox is not None and self._inbox.size > 0

    def _credit(self, used: int) -> None:
        if used < WINDOW_BYTES // 2 and not self.is_half_closed and not self.is_ended:
            self._receive_window += WINDOW_BYTES - used
            self._connection.write(window_update(self.id, WINDOW_BYTES - used))

    def answer(self, message: bytes) -> bool:
        """Send a whole answer in one piece; false, and nothing sent, where it does not fit."""
        connection, size = self._connection, len(message) + PREFIX_BYTES
        if size > self.send_window or not connection.takes_at_once(size) or self._has_headers or self.is_ended:
            return False
        connection.spend(size)
        self.is_ended = True
        connection.write(answers.whole(self.id, message))
        self._close()
        return True

    async def send(self, message: bytes) -> None:
        """Send one message as far as there is room, and wait for more until it is gone."""
        connection = self._connection
        lead: bytes = len(message).to_bytes(PREFIX_BYTES, "big")
        view = memoryview(message)
        while lead or view:
            room = min(self.send_window, connection.send_window, MAX_TURN_BYTES)
            if room <= 0 or connection.is_choked:
                await self._room()
                if self.is_ended:
                    connection.wake()
                    return
                continue
            pieces: list[Buffer] = []
            if not self._has_headers:
                self._has_headers = True
                block = connection.take_block_prefix() + answers.INITIAL
                pieces.append(frame(HEADERS, END_HEADERS, self.id, block))
            self._is_inside_message = True
            while room > 0 and (lead or view):
                size = min(room, connection.max_frame_bytes, len(lead) + len(view))
                room -= size
                self.send_window -= size
                connection.spend(size)
                head, lead = lead[:size], lead[size:]
                body, view = view[: size - len(head)], view[size - len(head) :]
                pieces += (HEADER.pack(size >> 8, size & 0xFF, DATA, 0, self.id) + head, body)
            connection.write_pieces(pieces)
        self._is_inside_message = False
        self._num_sent += 1
        if not self._num_sent % MAX_TURN_MESSAGES:
            await asyncio.sleep(0)

    async def _room(self) -> None:
        """Wait until something can be sent, or end the stream of a client that takes nothing for long."""
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S):
                if self.send_window > 0:
                    await self._connection.room()
                    return
                self._connection.wake()
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        except TimeoutError:
            self.end(answers.trailers(grpc.StatusCode.CANCELLED.value[0], "the client takes nothing"))
            raise grpc.aio.UsageError("the client takes nothing") from None
        finally:
            self._waiter = None

    def widen(self, num_bytes: int) -> None:
        """Let more be sent; less, where the number is negative."""
        self.send_window += num_bytes
        if self.send_window > 0 and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, block: bytes) -> None:
        """Send trailers, and nothing after them."""
        if self.is_ended:
            return
        self.is_ended = True
        if self._is_inside_message:
            # A client must not take the half of a message for the end of a stream.
            self._connection.write(rst_stream(self.id, ErrorCode.CANCEL))
            self._close()
            return
        if not self._has_headers:
            block = answers.INITIAL + block
        block = self._connection.take_block_prefix() + block
        assert len(block) <= DEFAULT_FRAME_BYTES, "statuses are cut to what clients take"
        self._connection.write(frame(HEADERS, END_HEADERS | END_STREAM, self.id, block))
        self._close()

    def refuse(self, status: int) -> None:
        """Answer what is no gRPC call."""
        self.is_ended = True
        block = self._connection.take_block_prefix() + answers.http_refusal(status)
        self._connection.write(frame(HEADERS, END_HEADERS | END_STREAM, self.id, block))
        self._close()

    def drop(self) -> None:
        """Forget it: the client or the connection is gone, or we reset it."""
        self.is_ended = True
        self.is_half_closed = True
        self._close()

    def _close(self) -> None:
        if self._inbox is not None:
            self._intake.num_readable -= self._inbox.has_message
            self._intake.held_bytes -= self._inbox.size
            self._inbox.clear()
        if not self.is_half_closed:
            # The answer is complete without the rest of the request (RFC 9113, section 8.1).
            self._connection.write(rst_stream(self.id, ErrorCode.NO_ERROR))
        self._connection.forget(self.id, is_sending=not self.is_half_closed)
