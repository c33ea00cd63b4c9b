import asyncio

import pytest

from sardonyx.errors import EngineError, Overloaded
from sardonyx.serving.together import together


def test_results_come_in_the_order_of_the_jobs():
    async def run():
        first_may_end = asyncio.Event()

        async def first():
            await first_may_end.wait()
            return 1

        async def second():
            first_may_end.set()
            return 2

        assert await together([first(), second()]) == [1, 2]
        assert await together([]) == []

    asyncio.run(run())


def test_first_failure_is_raised_as_it_is_and_the_others_have_ended():
    ended = []

    async def waits():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("waits")

    async def fails(error):
        raise error

    with pytest.raises(Overloaded, match="full"):
        asyncio.run(together([waits(), fails(Overloaded("full", retry_after_s=1.0)), fails(EngineError("late"))]))
    assert ended == ["waits"]


def test_a_failure_inside_of_a_failure_is_the_one_that_is_told():
    async def fails():
        raise EngineError("inner")

    with pytest.raises(EngineError, match="inner"):
        asyncio.run(together([together([fails()])]))
