import asyncio

import pytest

from sardonyx.core import FinishReason, Request, SequenceEvent
from sardonyx.errors import EngineDead
from sardonyx.serving.dispatch import EventDispatch


class Engine:
    """Takes requests and does nothing."""

    def __init__(self) -> None:
        self.is_alive = True
        self.submitted: list[str] = []
        self.aborted: list[str] = []

    def submit(self, request: Request) -> None:
        if not self.is_alive:
            raise EngineDead("dead")
        self.submitted.append(request.id)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def event(request_id: str, *token_ids: int) -> SequenceEvent:
    return SequenceEvent(request_id=request_id, token_ids=list(token_ids))


def make() -> tuple[EventDispatch, Engine]:
    dispatch, engine = EventDispatch(), Engine()
    dispatch.connect(engine)
    return dispatch, engine


def test_a_step_wakes_the_event_loop_once_and_reaches_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        dispatch, _ = make()
        seen: list[tuple[str, list[int]]] = []
        for name in ("a", "b", "c"):
            request = Request(id=name, prompt_ids=[1])
            dispatch.submit(request, lambda request_id, event: seen.append((request_id, event.token_ids)))
        loop, calls = asyncio.get_running_loop(), []
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *arguments: calls.append(arguments))
        dispatch.forget("b")
        dispatch.deliver([event("a", 1), event("b", 2), event("c", 3), event("unknown", 4)])
        ((function, *arguments),) = calls
        function(*arguments)
        assert seen == [("a", [1]), ("c", [3])]

    asyncio.run(main())


def test_a_bug_in_one_request_ends_that_request_and_no_other() -> None:
    async def main() -> None:
        dispatch, engine = make()
        seen: list[tuple[str, FinishReason | None]] = []

        def sink(request_id: str, event: SequenceEvent) -> None:
            seen.append((request_id, event.finish_reason))
            if request_id == "bad" and event.finish_reason is None:
                raise KeyError("a bug")

        for name in ("bad", "good"):
            dispatch.submit(Request(id=name, prompt_ids=[1]), sink)
        dispatch.deliver([event("bad", 1), event("good", 2)])
        dispatch.deliver([event("bad", 1), event("good", 2)])
        await asyncio.sleep(0)
        assert seen == [("bad", None), ("bad", FinishReason.ERROR), ("good", None), ("good", None)]
        assert engine.aborted == ["bad"]

    asyncio.run(main())


def test_nothing_comes_for_a_request_that_a_dead_engine_refused() -> None:
    async def main() -> None:
        dispatch, engine = make()
        engine.is_alive = False
        assert not dispatch.is_alive
        seen: list[str] = []
        with pytest.raises(EngineDead):
            dispatch.submit(Request(id="a", prompt_ids=[1]), lambda request_id, _: seen.append(request_id))
        dispatch.deliver([event("a", 1)])
        await asyncio.sleep(0)
        assert not seen

    asyncio.run(main())


def test_events_for_a_closed_event_loop_are_dropped() -> None:
    dispatch, _ = make()
    dispatch.deliver([event("a", 1)])  # before any request

    async def main() -> None:
        dispatch.submit(Request(id="a", prompt_ids=[1]), lambda *_: None)

    asyncio.run(main())
    dispatch.deliver([event("a", 1)])
