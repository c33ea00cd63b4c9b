import asyncio
import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.serving.fakes import Served, loaded, spell, until

from sardonyx.core import FinishReason
from sardonyx.errors import ConfigError, ModelNotFound, ModelNotReady, ServeError
from sardonyx.repository.index import IndexEntry
from sardonyx.serving.registry import ModelState, Registry
from sardonyx.serving.served import LoadedModel, ModelOverride
from sardonyx.serving.text import GenerationOptions, TextModel
from sardonyx.serving.text_tensors import TextTensorModel

LETTERS = spell(list(range(69, 95)))


class Shelf:
    """A source of models on scripted runners."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder = folder
        self.facts = {name: IndexEntry(name=name, versions=[1], family="llm", size_bytes=5) for name in names}
        self.errors: dict[str, Exception] = {}
        self.gate = threading.Event()
        """Loads wait while it is clear."""
        self.gate.set()
        self.served: list[Served] = []
        self.is_closed = False
        self.num_at_once = 0
        self.most_at_once = 0

    def index(self) -> list[IndexEntry]:
        return list(self.facts.values())

    def load(self, name: str, override: ModelOverride | None = None) -> LoadedModel:
        self.num_at_once += 1
        self.most_at_once = max(self.most_at_once, self.num_at_once)
        try:
            self.gate.wait()
            if name in self.errors:
                raise self.errors[name]
            served = Served(self.folder, LETTERS, name=name, version=len(self.served) + 1)
            self.served.append(served)
            return loaded(served.model)
        finally:
            self.num_at_once -= 1

    def progress(self, name: str) -> str:
        return ""

    def close(self) -> None:
        self.is_closed = True

    def assert_closed(self) -> None:
        assert self.is_closed
        for served in self.served:
            assert served.runner.is_closed
            served.assert_idle()
            served.pool.close()


def text_of(model: LoadedModel) -> TextModel:
    assert isinstance(model.newest, TextTensorModel)
    return model.newest.text


def run(shelf: Shelf, test: Callable[[Registry], Awaitable[None]], *, start: bool = True, **options: object) -> None:
    """Run a test on a registry; afterwards every model that was ever loaded must be closed."""

    async def main() -> None:
        registry = Registry(shelf, **options)  # type: ignore[arg-type]
        if start:
            await registry.start()
        await test(registry)
        for served in shelf.served:
            served.runner.gate.set()
        await registry.close()
        shelf.assert_closed()

    asyncio.run(main())


def refuses(registry: Registry, name: str) -> bool:
    try:
        registry.resolve(name)
    except ModelNotReady:
        return True
    return False


def states(registry: Registry) -> dict[str, str]:
    return {status.name: status.state for status in registry.list()}


def test_every_model_of_a_known_family_is_loaded_at_start(folder: Path) -> None:
    shelf = Shelf(folder, "b", "a")
    shelf.facts["pictures"] = IndexEntry(name="pictures", versions=[1], family="video")

    async def test(registry: Registry) -> None:
        assert states(registry) == {"a": "READY", "b": "READY", "pictures": "UNAVAILABLE"}
        assert registry.resolve("b").name == "b"
        with pytest.raises(ModelNotReady, match="pictures is unavailable: models of the family video"):
            registry.resolve("pictures")
        assert registry.is_ready()

    run(shelf, test)


def test_a_request_without_a_name_gets_the_default_model(folder: Path) -> None:
    async def first(registry: Registry) -> None:
        assert registry.resolve(None).name == registry.resolve("").name == "a"

    async def chosen(registry: Registry) -> None:
        assert registry.resolve(None).name == "b"

    run(Shelf(folder, "b", "a"), first)
    run(Shelf(folder, "b", "a"), chosen, default_model="b")
    broken = Shelf(folder, "b", "a")
    broken.errors["a"] = ConfigError("is broken")
    run(broken, chosen)


def test_aliases_stand_for_models_and_unknown_names_are_not_found(folder: Path) -> None:
    async def test(registry: Registry) -> None:
        assert registry.resolve("gpt-3.5-turbo").name == "a"
        for name in ("gpt-4", "nobody"):
            with pytest.raises(ModelNotFound) as caught:
                registry.resolve(name)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        await registry.unload("gpt-3.5-turbo")
        assert states(registry) == {"a": "UNAVAILABLE"}
        await registry.load("gpt-3.5-turbo")

    run(Shelf(folder, "a"), test, aliases={"gpt-3.5-turbo": "a", "gpt-4": "gone"})


def test_an_empty_repository_is_ready_and_has_no_default(folder: Path) -> None:
    async def test(registry: Registry) -> None:
        assert registry.is_ready()
        with pytest.raises(ModelNotFound):
            registry.resolve(None)

    run(Shelf(folder), test)


def test_requests_and_lists_are_answered_while_models_load(folder: Path) -> None:
    shelf = Shelf(folder, "a", "b", "c")
    shelf.gate.clear()

    async def test(registry: Registry) -> None:
        assert registry.unready_reasons() == ["the server is starting"]
        starting = asyncio.create_task(registry.start())
        await until(lambda: "a" in states(registry))
        assert states(registry) == dict.fromkeys("abc", "LOADING")
        with pytest.raises(ModelNotReady, match="a is loading"):
            registry.resolve("a")
        assert "model a is loading" in registry.unready_reasons()
        shelf.gate.set()
        await starting
        assert registry.is_ready()
        assert shelf.most_at_once <= 2

    run(shelf, test, start=False)


def test_a_model_that_cannot_be_loaded_says_why_without_paths(folder: Path) -> None:
    shelf = Shelf(folder, "a", "b")
    shelf.errors["a"] = ConfigError("is broken", file="/secret/folder/config.pbtxt", field="parameters")
    shelf.errors["b"] = ValueError("internals at 0x1234")

    async def test(registry: Registry) -> None:
        reasons = {status.name: status.reason for status in registry.list()}
        assert reasons == {"a": "config.pbtxt: parameters: is broken", "b": "an internal error, see the log"}
        with pytest.raises(ModelNotReady, match=r"a is unavailable: config\.pbtxt: parameters: is broken"):
            registry.resolve("a")
        assert not registry.is_ready()
        shelf.errors.clear()
        await registry.load("a")
        await registry.load("b")
        assert registry.is_ready()
        assert [status.reason for status in registry.list()] == ["", ""]

    run(shelf, test)


def test_a_reload_replaces_the_model_and_the_old_one_finishes_what_it_has(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        old = registry.resolve("a")
        shelf.served[0].runner.gate.clear()
        generation = await old.start(["x"], GenerationOptions(max_tokens=5), request_id="r")
        new = text_of(await registry.load("a"))
        assert registry.resolve("a") is new is not old
        assert registry.stop_generation("nobody") == 0
        shelf.served[0].runner.gate.set()
        assert [choice.text for choice in await generation.collect()] == ["abcde"]

    run(shelf, test)


def test_a_failed_reload_leaves_the_old_model_serving_and_the_reason(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        old = registry.resolve("a")
        shelf.errors["a"] = ConfigError("is broken")
        with pytest.raises(ModelNotReady, match="cannot be loaded: is broken"):
            await registry.load("a")
        assert registry.resolve("a") is old
        assert registry.is_ready()
        (status,) = registry.list()
        assert (status.state, status.reason) == (
            ModelState.READY,
            "version 1 serves; the last reload failed: is broken",
        )

    run(shelf, test)


def test_unloading_waits_for_requests_and_then_refuses(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        model = registry.resolve("a")
        shelf.served[0].runner.gate.clear()
        generation = await model.start(["x"], GenerationOptions(max_tokens=5), request_id="r")
        collecting = asyncio.create_task(generation.collect())
        unloading = asyncio.create_task(registry.unload("a"))
        await until(lambda: states(registry)["a"] == "UNLOADING")
        with pytest.raises(ModelNotReady, match="a is unloading"):
            registry.resolve("a")
        shelf.served[0].runner.gate.set()
        await unloading
        assert [choice.finish_reason for choice in await collecting] == [FinishReason.LENGTH]
        with pytest.raises(ModelNotReady, match="a is unavailable: unloaded"):
            registry.resolve("a")
        assert registry.is_ready()  # it was meant to go

    run(shelf, test)


def test_unloading_ends_what_outlasts_its_limit(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        shelf.served[0].runner.gate.clear()
        generation = await registry.resolve("a").start(["x"], GenerationOptions(max_tokens=200), request_id="r")
        unloading = asyncio.create_task(registry.unload("a"))
        with pytest.raises(ModelNotReady, match="unloaded before"):
            await generation.collect()
        shelf.served[0].runner.gate.set()
        await unloading

    run(shelf, test, unload_timeout_s=0.0)


def test_a_load_goes_on_when_its_caller_leaves(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        await registry.unload("a")
        shelf.gate.clear()
        first, second = asyncio.create_task(registry.load("a")), asyncio.create_task(registry.load("a"))
        await until(lambda: states(registry)["a"] == "LOADING")
        first.cancel()
        await asyncio.sleep(0)
        shelf.gate.set()
        assert text_of(await second) is registry.resolve("a")
        assert len(shelf.served) == 2  # who asked meanwhile got the same load

    run(shelf, test)


def test_a_model_that_comes_later_can_be_loaded_and_one_that_goes_is_forgotten(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        with pytest.raises(ModelNotFound):
            await registry.load("b")
        shelf.facts["b"] = IndexEntry(name="b", versions=[3], family="llm")
        assert text_of(await registry.load("b")).name == "b"
        del shelf.facts["a"], shelf.facts["b"]
        await registry.unload("b")
        await registry.refresh()
        assert states(registry) == {"a": "READY"}  # still loaded
        with pytest.raises(ModelNotFound):
            await registry.unload("b")

    run(shelf, test)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), None])
def test_readiness_needs_engines_that_live_and_move(folder: Path, error: Exception | None) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        served = shelf.served[0]
        served.runner.gate.clear()
        generation = await registry.resolve("a").start(["x"], GenerationOptions(max_tokens=200), request_id="r")
        assert registry.is_ready()
        if error is None:
            served.later_s = 31.0
            assert registry.unready_reasons() == ["the engine of model a makes no progress"]
        else:
            served.runner.error = error
            served.runner.gate.set()
            with pytest.raises(ServeError):
                await generation.collect()
            assert registry.unready_reasons() == ["the engine of model a stopped"]
            assert text_of(await registry.load("a")).is_alive
            assert registry.is_ready()
        served.later_s = 0.0
        generation.abort()

    run(shelf, test)


def test_draining_finishes_what_runs_refuses_what_comes_and_is_not_ready(folder: Path) -> None:
    shelf = Shelf(folder, "a", "b")

    async def test(registry: Registry) -> None:
        for served in shelf.served:
            served.runner.gate.clear()
        generations = [
            await registry.resolve(name).start(["x"], GenerationOptions(max_tokens=5), request_id=name) for name in "ab"
        ]
        draining = asyncio.create_task(registry.drain(0.0, 10.0))
        await asyncio.sleep(0)
        assert registry.unready_reasons() == ["the server is shutting down"]
        late = await registry.resolve("a").start(["x"], GenerationOptions(max_tokens=5), request_id="late")
        await until(lambda: refuses(registry, "a"))
        for served in shelf.served:
            served.runner.gate.set()
        for generation in [*generations, late]:
            assert [choice.text for choice in await generation.collect()] == ["abcde"]
        await draining
        for call in (registry.load, registry.unload):
            with pytest.raises(ModelNotReady):
                await call("a")

    run(shelf, test)


def test_closing_while_a_model_loads_closes_that_model_too(folder: Path) -> None:
    shelf = Shelf(folder, "a")

    async def test(registry: Registry) -> None:
        shelf.gate.clear()
        loading = asyncio.create_task(registry.load("a"))
        await until(lambda: shelf.num_at_once == 1)
        closing = asyncio.create_task(registry.close())
        await asyncio.sleep(0)
        shelf.gate.set()
        await closing
        with pytest.raises(ModelNotReady):
            await loading
        assert len(shelf.served) == 2

    run(shelf, test)


def test_loads_unloads_and_requests_at_random_end_well(folder: Path) -> None:
    shelf = Shelf(folder, "a", "b")
    chance = random.Random(3)

    async def client(registry: Registry, number: int) -> None:
        name = chance.choice("ab")
        match chance.choice(["load", "unload", "request", "request", "request"]):
            case "load":
                await registry.load(name)
            case "unload":
                await registry.unload(name)
            case "request":
                options = GenerationOptions(max_tokens=chance.randint(1, 20))
                generation = await registry.resolve(name).start(["x"], options, request_id=str(number))
                (choice,) = await generation.collect()
                assert choice.finish_reason is FinishReason.LENGTH

    async def test(registry: Registry) -> None:
        tasks = []
        for number in range(120):
            tasks.append(asyncio.create_task(client(registry, number)))
            for _ in range(chance.randint(0, 10)):
                await asyncio.sleep(0)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, ModelNotReady) for result in results)
        for name in "ab":
            await registry.load(name)
        assert registry.is_ready()

    run(shelf, test)
