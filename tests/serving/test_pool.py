import asyncio
import threading

import pytest

from sardonyx.errors import Overloaded
from sardonyx.serving.pool import WorkerPool


def test_jobs_run_off_the_event_loop_and_their_errors_come_back() -> None:
    def fail() -> None:
        raise ValueError("from the job")

    async def main() -> None:
        pool = WorkerPool(num_threads=1)
        assert await pool.run(threading.get_ident) != threading.get_ident()
        with pytest.raises(ValueError, match="from the job"):
            await pool.run_bounded(fail)
        pool.close()

    asyncio.run(main())


def test_uncounted_jobs_are_refused_when_too_many_wait_and_counted_ones_are_not() -> None:
    async def main() -> None:
        pool = WorkerPool(num_threads=1, max_waiting=2)
        gate = threading.Event()
        tasks = [asyncio.create_task(pool.run_bounded(gate.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await pool.run_bounded(gate.wait)
        counted = asyncio.create_task(pool.run(gate.wait))
        tasks[-1].cancel()  # who leaves makes room
        await asyncio.sleep(0)
        counted.cancel()
        await asyncio.sleep(0)
        last = asyncio.create_task(pool.run_bounded(int))
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*tasks[:2], last) == [True, True, 0]
        pool.close()

    asyncio.run(main())


def test_a_job_that_was_cancelled_before_it_started_never_runs() -> None:
    async def main() -> None:
        pool = WorkerPool(num_threads=1)
        gate, ran = threading.Event(), threading.Event()
        first, second = asyncio.create_task(pool.run(gate.wait)), asyncio.create_task(pool.run(ran.set))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        await first
        await pool.run(int)
        assert not ran.is_set()
        pool.close()

    asyncio.run(main())
