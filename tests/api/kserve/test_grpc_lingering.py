import asyncio

import pytest

from sardonyx.api.kserve.grpc_lingering import Lingering


async def for_ever():
    await asyncio.Event().wait()


async def nothing():
    pass


def test_a_part_that_ends_by_itself_was_not_cut_short():
    assert asyncio.run(Lingering().run(nothing()))


def test_a_stop_cuts_parts_short_and_those_to_come():
    async def main():
        lingering = Lingering()
        running = asyncio.ensure_future(lingering.run(for_ever()))
        await asyncio.sleep(0)
        lingering.stop()
        return await running, await lingering.run(for_ever())

    assert asyncio.run(main()) == (False, False)


def test_cancelling_the_caller_cancels_its_part():
    ended = []

    async def part():
        try:
            await for_ever()
        finally:
            ended.append(True)

    async def main():
        running = asyncio.ensure_future(Lingering().run(part()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert ended == [True]


def test_an_error_of_a_part_comes_through():
    async def part():
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(Lingering().run(part()))
