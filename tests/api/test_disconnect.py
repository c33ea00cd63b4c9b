import asyncio

import pytest

from sardonyx.api.disconnect import while_connected
from sardonyx.errors import RequestAborted


class Client:
    """An ASGI receive channel. uvicorn may repeat an empty body before the disconnect."""

    def __init__(self) -> None:
        self.has_left = asyncio.Event()
        self._is_first = True

    async def receive(self):
        if self._is_first:
            self._is_first = False
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}


def test_work_that_ends_first_gives_its_result():
    async def main():
        async def work():
            await asyncio.sleep(0)
            return 42

        assert await while_connected(Client().receive, work()) == 42
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_an_error_of_the_work_comes_through():
    async def main():
        async def work():
            raise KeyError("x")

        with pytest.raises(KeyError):
            await while_connected(Client().receive, work())

    asyncio.run(main())


def test_work_is_cancelled_when_the_client_leaves():
    async def main():
        client, cleaned = Client(), []

        async def work():
            try:
                client.has_left.set()
                await asyncio.Event().wait()
            finally:
                cleaned.append(True)

        with pytest.raises(RequestAborted):
            await while_connected(client.receive, work())
        assert cleaned == [True]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_work_is_cancelled_when_the_server_gives_up_the_request():
    async def main():
        begun, cleaned = asyncio.Event(), []

        async def work():
            try:
                begun.set()
                await asyncio.Event().wait()
            finally:
                cleaned.append(True)

        task = asyncio.create_task(while_connected(Client().receive, work()))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [True]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
