import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serving.fake_models import CALL, FakeSource, edition, rows, run, states
from tests.serving.fakes import until

from sardonyx.errors import ConfigError, InvalidRequest, ModelNotFound, ModelNotReady
from sardonyx.repository.index import DUPLICATE
from sardonyx.serving import lifecycle
from sardonyx.serving.lifecycle import LoadFailed
from sardonyx.serving.registry import Registry
from sardonyx.serving.served import ModelOverride

OVERRIDE = ModelOverride(config='{"backend": "onnxruntime"}')


def made_of(*parts: str) -> ModelOverride:
    """An override that makes an ensemble."""
    steps = [{"model_name": part, "input_map": {"A": "A"}, "output_map": {"B": "B"}} for part in parts]
    return ModelOverride(config=json.dumps({"platform": "ensemble", "ensemble_scheduling": {"step": steps}}))


async def has_looked(registry: Registry) -> None:
    """Wait until a load that was just begun has looked at the repository: looks come one after the other."""
    await asyncio.sleep(0)
    await registry.refresh()


# Loading


def test_a_model_whose_files_did_not_change_is_left_alone() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        first = registry.served("a")
        await registry.load("a", only_if_changed=True)
        assert registry.served("a") is first
        source.write("a")
        await registry.load("a", only_if_changed=True)
        assert registry.served("a") is not first
        assert await edition(registry, "a") == 2

    run(source, test)


def test_a_failed_reload_is_tried_again_though_no_file_changed() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        source.write("a")
        source.errors["a"] = ConfigError("is broken", file="/secret/config.pbtxt")
        for _ in range(2):
            with pytest.raises(LoadFailed, match="is broken") as caught:
                await registry.load("a", only_if_changed=True)
            assert caught.value.reason == "config.pbtxt: is broken"
        assert await edition(registry, "a") == 1
        source.errors.clear()
        await registry.load("a", only_if_changed=True)
        assert await edition(registry, "a") == 4

    run(source, test)


def test_a_model_whose_engine_died_is_loaded_again_though_no_file_changed() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        source.made[0].is_alive = False
        assert not registry.is_ready()
        await registry.load("a", only_if_changed=True)
        assert registry.is_ready()

    run(source, test)


def test_who_asks_after_the_files_changed_gets_no_load_of_the_old_ones() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        gate = source.hold("a")
        first = asyncio.create_task(registry.load("a", only_if_changed=True))
        await until(lambda: source.loaded_names() == ["a"])
        source.write("a")
        second = asyncio.create_task(registry.load("a", only_if_changed=True))
        await has_looked(registry)
        gate.set()
        editions = [(await task).newest.edition for task in (first, second)]  # type: ignore[attr-defined]
        assert editions == [1, 2]

    run(source, test, start=())


def test_a_load_without_a_name_in_the_repository_is_not_found_and_leaves_no_trace() -> None:
    async def test(registry: Registry) -> None:
        with pytest.raises(ModelNotFound):
            await registry.load("b", only_if_changed=True)
        assert rows(registry) == [("a",)]

    run(FakeSource("a"), test, start=())


def test_a_repository_that_cannot_be_read_is_told_without_its_path() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        source.index_error = ConfigError("no model repository", file="/secret")
        with pytest.raises(ModelNotReady, match=r"^the model repositories cannot be read$"):
            await registry.load("a")
        assert await edition(registry, "a") == 1
        source.index_error = None

    run(source, test)


# What callers bring along


def test_an_override_is_kept_until_the_files_change() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        await registry.load("a", OVERRIDE)
        await registry.load("a", only_if_changed=True)  # nothing changed, so nothing is done
        await registry.load("a")
        assert source.loads[1:] == [("a", OVERRIDE.config)] * 2
        source.write("a")
        await registry.load("a", only_if_changed=True)
        assert source.loads[3:] == [("a", "")]
        await registry.load("a", OVERRIDE)
        await registry.unload("a")
        await registry.load("a", only_if_changed=True)
        assert source.loads[-1] == ("a", "")

    run(source, test)


def test_who_brings_nothing_along_does_not_get_the_failure_of_who_does() -> None:
    source = FakeSource("a")

    def fail_once(_: str) -> None:
        source.on_loaded = lambda _: None
        raise ConfigError("does not suit")

    async def test(registry: Registry) -> None:
        gate = source.hold("a")
        source.on_loaded = fail_once
        bringing = asyncio.create_task(registry.load("a", OVERRIDE))
        await until(lambda: len(source.loads) == 1)
        plain = asyncio.create_task(registry.load("a", only_if_changed=True))
        await has_looked(registry)
        gate.set()
        with pytest.raises(LoadFailed, match="does not suit"):
            await bringing
        assert (await plain).newest is registry.served("a")
        assert source.loads == [("a", OVERRIDE.config), ("a", "")]

    run(source, test, start=())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (ModelOverride(config="{"), "config: is not JSON"),
        (ModelOverride(config='{"max_batch_size": []}'), "max_batch_size"),
        (ModelOverride(config='{"name": "b"}'), "name: is 'b'"),
        (ModelOverride(config="{}", files={"../x": b""}), "must stay within model directory"),
    ],
)
def test_a_wrong_override_changes_nothing(override: ModelOverride, message: str) -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        with pytest.raises(InvalidRequest, match=message):
            await registry.load("a", override)
        assert rows(registry) == [("a",)]
        assert source.loads == []

    run(source, test, start=())


def test_files_that_come_along_make_a_model_that_the_repository_does_not_have() -> None:
    source = FakeSource()

    async def test(registry: Registry) -> None:
        await registry.load("b", ModelOverride(config="{}", files={"1/model.onnx": b""}))
        await registry.refresh()
        assert rows(registry) == [("b", 1, "READY")]
        await registry.unload("b")
        await registry.refresh()
        assert rows(registry) == []

    run(source, test)


# Ensembles


def test_an_ensemble_brings_its_parts_along_and_their_parts() -> None:
    source = FakeSource("a", "b", inner=["a"], outer=["inner"])

    async def test(registry: Registry) -> None:
        await registry.load("outer")
        assert source.loaded_names() == ["a", "inner", "outer"]
        assert await edition(registry, "outer") == 3
        assert rows(registry)[1] == ("b",)

    run(source, test, start=(), max_loads=1)


def test_an_ensemble_of_an_override_brings_its_parts_along() -> None:
    source = FakeSource("a", "b")

    async def test(registry: Registry) -> None:
        await registry.load("b", made_of("a"))
        assert source.loaded_names() == ["a", "b"]
        await registry.unload("a")
        assert rows(registry)[1] == ("b", 1, "UNAVAILABLE", "model a, on which it depends, was unloaded")

    run(source, test, start=())


def test_an_ensemble_follows_its_parts_files() -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        await registry.load("outer", only_if_changed=True)
        source.write("a")
        await registry.load("outer", only_if_changed=True)
        assert source.loaded_names() == ["a", "outer", "a", "outer"]

    run(source, test, start=())


def test_an_ensemble_of_a_broken_part_says_so() -> None:
    source = FakeSource("a", outer=["a"])
    source.errors["a"] = ConfigError("is broken")

    async def test(registry: Registry) -> None:
        assert rows(registry)[0] == ("a", 1, "UNAVAILABLE", "is broken")
        ((name, version, state, reason),) = rows(registry)[1:]
        assert (name, version, state) == ("outer", 1, "UNAVAILABLE")
        assert "'a' has no available versions: is broken" in str(reason)

    run(source, test)


@pytest.mark.parametrize("is_at_once", [True, False])
def test_ensembles_that_need_each_other_are_refused_and_nobody_waits(is_at_once: bool) -> None:
    source = FakeSource("a", one=["a", "two"], two=["three"], three=["one"])

    async def test(registry: Registry) -> None:
        names = ["one", "two", "three"]
        if is_at_once:
            await asyncio.gather(*map(registry.load, names), return_exceptions=True)
        else:
            with pytest.raises(LoadFailed, match=r"between ensembles: one -> two -> three -> one"):
                await registry.load("one")
        for name in names:
            with pytest.raises(LoadFailed, match="circular dependency between ensembles: "):
                await registry.load(name)
        assert states(registry).keys() == {"a", *names}
        source.write("two")
        await registry.load("one")
        assert await edition(registry, "one") == max(range(1, len(source.loads) + 1))

    run(source, test, start=())


def test_a_circle_that_files_and_overrides_make_together_is_refused() -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        with pytest.raises(LoadFailed, match="circular dependency between ensembles: a -> outer -> a"):
            await registry.load("a", made_of("outer"))
        assert await edition(registry, "outer") == 2

    run(source, test)


def test_unloading_works_when_files_were_written_that_make_a_circle() -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        source.write("a", depends_on=("outer",))
        await registry.refresh()
        await registry.unload("a")
        assert set(states(registry).values()) == {"UNAVAILABLE"}

    run(source, test)


def test_a_part_takes_its_ensembles_along_and_brings_them_back() -> None:
    source = FakeSource("a", "b", inner=["a"], outer=["inner", "b"])

    async def test(registry: Registry) -> None:
        await registry.unload("a")
        assert rows(registry) == [
            ("a", 1, "UNAVAILABLE", "unloaded"),
            ("b", 1, "READY"),
            ("inner", 1, "UNAVAILABLE", "model a, on which it depends, was unloaded"),
            ("outer", 1, "UNAVAILABLE", "model inner, on which it depends, was unloaded"),
        ]
        assert registry.is_ready()
        await registry.load("a")
        assert set(states(registry).values()) == {"READY"}

    run(source, test)


def test_an_ensemble_that_was_unloaded_by_name_stays_away_when_its_part_comes_back() -> None:
    async def test(registry: Registry) -> None:
        await registry.unload("outer")
        await registry.unload("a")
        await registry.load("a")
        assert states(registry) == {"a": "READY", "outer": "UNAVAILABLE"}
        assert rows(registry)[1] == ("outer", 1, "UNAVAILABLE", "unloaded")

    run(FakeSource("a", outer=["a"]), test)


def test_an_ensemble_that_waits_for_its_part_is_not_waited_for_by_the_part() -> None:
    source = FakeSource("a", inner=["a"], outer=["inner"])

    async def test(registry: Registry) -> None:
        outer = next(version for version in source.made if version.name == "outer")
        outer.gate.clear()
        call = asyncio.create_task(registry.served("outer").infer(CALL))
        await until(lambda: outer.num_active == 1)
        unloading = asyncio.create_task(registry.unload("a"))
        await until(lambda: states(registry)["outer"] == "UNLOADING")
        source.write("a")
        loading = asyncio.create_task(registry.load("inner"))  # waits for a, whose unloading will stop inner
        await has_looked(registry)
        outer.gate.set()
        await asyncio.gather(call, unloading, loading)
        assert set(states(registry).values()) == {"READY"}

    run(source, test, timeout_s=20)


def test_a_part_that_was_unloaded_by_name_is_not_brought_back_with_the_ensemble_of_another() -> None:
    async def test(registry: Registry) -> None:
        await registry.unload("a")
        await registry.unload("b")
        await registry.load("a")
        assert states(registry) == {"a": "READY", "b": "UNAVAILABLE", "outer": "UNAVAILABLE"}
        await registry.load("b")
        assert set(states(registry).values()) == {"READY"}

    run(FakeSource("a", "b", outer=["a", "b"]), test)


def test_unload_dependents_takes_the_parts_of_an_ensemble_along() -> None:
    async def test(registry: Registry) -> None:
        await registry.unload("outer", unload_dependents=True)
        assert states(registry) == dict.fromkeys(["a", "inner", "outer"], "UNAVAILABLE") | {"b": "READY"}
        await registry.load("a")
        assert states(registry)["outer"] == "UNAVAILABLE"

    run(FakeSource("a", "b", inner=["a"], outer=["inner"]), test)


@pytest.mark.parametrize("is_first", ["unload", "reload"])
def test_a_part_stays_while_an_ensemble_that_goes_has_calls(is_first: str) -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        outer = next(version for version in source.made if version.name == "outer")
        outer.gate.clear()
        call = asyncio.create_task(registry.served("outer").infer(CALL))
        await until(lambda: outer.num_active == 1)
        if is_first == "unload":
            going = asyncio.create_task(registry.unload("outer"))
        else:
            going = asyncio.create_task(registry.load("outer"))
        await until(lambda: states(registry)["outer"] == "UNLOADING" or len(source.loads) == 3)
        part_going = asyncio.create_task(registry.unload("a"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not part_going.done()
        outer.gate.set()
        assert (await call).parameters == {"edition": 2}
        await asyncio.gather(going, part_going)
        assert set(states(registry).values()) == {"UNAVAILABLE"}

    run(source, test)


def test_a_part_that_goes_while_its_ensemble_loads_leaves_no_ensemble() -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        loop = asyncio.get_running_loop()
        # In the thread of the load, after it has seen that the part is there.
        source.on_loaded = lambda name: (
            asyncio.run_coroutine_threadsafe(registry.unload("a"), loop).result() if name == "outer" else None
        )
        with pytest.raises(LoadFailed, match="model a, on which it depends, was unloaded"):
            await registry.load("outer")
        assert set(states(registry).values()) == {"UNAVAILABLE"}
        source.on_loaded = lambda _: None
        await registry.load("a")
        assert set(states(registry).values()) == {"READY"}

    run(source, test, start=())


def test_ensembles_finish_their_steps_while_the_server_shuts_down() -> None:
    source = FakeSource("a", inner=["a"], outer=["inner"])

    async def test(registry: Registry) -> None:
        outer = next(version for version in source.made if version.name == "outer")
        outer.gate.clear()
        call = asyncio.create_task(registry.served("outer").infer(CALL))
        await until(lambda: outer.num_active == 1)
        draining = asyncio.create_task(registry.drain(0.0, 30.0))
        await until(lambda: not registry.is_live)
        with pytest.raises(ModelNotReady, match="the server is shutting down"):
            registry.served("a")
        outer.gate.set()
        assert (await call).parameters == {"edition": 3}
        await draining

    run(source, test)


# Following the repositories


def test_a_look_at_the_repositories_follows_what_is_new_changed_and_gone() -> None:
    source = FakeSource("a", "b")

    async def test(registry: Registry) -> None:
        await registry.poll()
        assert source.loaded_names() == ["a", "b"]
        source.write("c", versions=[1, 3])
        source.write("a", versions=[2])
        del source.facts["b"]
        await registry.poll()
        assert rows(registry) == [
            ("a", 1, "UNAVAILABLE", "unloaded"),
            ("a", 2, "READY"),
            ("b", 1, "UNAVAILABLE", "unloaded"),
            ("c", 1, "READY"),
            ("c", 3, "READY"),
        ]
        await registry.poll()
        assert "b" not in states(registry)
        assert len(source.loads) == 4
        assert registry.is_ready()

    run(source, test)


def test_what_failed_is_tried_again_only_when_its_files_changed() -> None:
    source = FakeSource("a")
    source.errors["a"] = ConfigError("is broken")

    async def test(registry: Registry) -> None:
        await registry.poll()
        assert len(source.loads) == 1
        source.write("a")
        await registry.poll()
        assert len(source.loads) == 2
        source.errors.clear()
        await registry.poll()
        assert len(source.loads) == 2
        source.write("a")
        await registry.poll()
        assert states(registry) == {"a": "READY"}
        source.write("a")
        source.errors["a"] = ConfigError("is broken again")
        await registry.poll()
        await registry.poll()
        assert rows(registry) == [("a", 1, "READY", "version 1 serves; the last reload failed: is broken again")]
        assert len(source.loads) == 4

    run(source, test)


def test_a_folder_that_is_being_changed_is_looked_at_again_later() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        source.write("a", fingerprint="")
        await registry.poll()
        assert len(source.loads) == 1
        source.write("a")
        await registry.poll()
        assert len(source.loads) == 2

    run(source, test)


def test_a_model_that_appears_twice_is_served_from_neither_until_one_is_gone() -> None:
    source = FakeSource("a")

    async def test(registry: Registry) -> None:
        source.write("a", reason=DUPLICATE, versions=[], family="")
        source.errors["a"] = ConfigError(DUPLICATE)
        for _ in range(3):
            await registry.poll()
            assert rows(registry) == [("a", 1, "UNAVAILABLE", DUPLICATE)]
        assert registry.is_ready()
        source.errors.clear()
        source.write("a")
        await registry.poll()
        assert rows(registry) == [("a", 1, "READY")]

    run(source, test)


def test_an_ensemble_whose_part_comes_back_is_loaded_again() -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        del source.facts["a"]
        for _ in range(3):
            await registry.poll()
        assert states(registry) == {"outer": "UNAVAILABLE"}
        num_loads = len(source.loads)
        await registry.poll()
        assert len(source.loads) == num_loads
        source.write("a")
        await registry.poll()
        assert states(registry) == {"a": "READY", "outer": "READY"}

    run(source, test)


# The index


def test_the_index_tells_never_loaded_unloaded_and_withdrawn_apart() -> None:
    source = FakeSource("fresh", "gone")
    source.write("a", versions=[1, 2])

    async def test(registry: Registry) -> None:
        await registry.load("a")
        await registry.load("gone")
        await registry.unload("gone")
        source.write("a", versions=[2, 3])
        await registry.refresh()
        assert ("a", 3) not in [row[:2] for row in rows(registry)]
        await registry.load("a")
        assert rows(registry) == [
            ("a", 1, "UNAVAILABLE", "unloaded"),
            ("a", 2, "READY"),
            ("a", 3, "READY"),
            ("fresh",),
            ("gone", 1, "UNAVAILABLE", "unloaded"),
        ]
        with pytest.raises(ModelNotReady, match="'a' version 1 is not at ready state"):
            registry.served("a", 1)
        with pytest.raises(ModelNotFound, match="'a' version 4 is not found"):
            registry.served("a", 4)
        with pytest.raises(ModelNotReady, match="'gone' has no available versions: unloaded"):
            registry.served("gone")

    run(source, test, start=())


def test_a_broken_model_that_nobody_loaded_shows_no_path() -> None:
    source = FakeSource()
    source.write("a", versions=[], family="", reason="/secret/a/config.pbtxt: is broken")

    async def test(registry: Registry) -> None:
        with pytest.raises(ModelNotReady, match="has no available versions: not loaded"):
            registry.served("a")
        assert [status.reason for status in registry.list()] == ["not loaded"]

    run(source, test, start=())


# Start and end


def test_a_wanted_model_that_is_not_there_keeps_the_server_from_being_ready_and_no_other_from_serving() -> None:
    async def test(registry: Registry) -> None:
        assert registry.startup_failures() == {"b": "is not in the repository"}
        assert registry.unready_reasons() == ["model b is not in the repository"]
        assert registry.is_live
        assert await edition(registry, "a") == 1

    run(FakeSource("a"), test, start=["a", "b"])


def test_readiness_that_is_not_strict_asks_for_no_model() -> None:
    source = FakeSource("a", "b")
    source.errors["b"] = ConfigError("is broken")

    async def test(registry: Registry) -> None:
        assert registry.is_ready()
        assert registry.startup_failures() == {"b": "is broken"}

    run(source, test, is_strict=False)


def test_a_wanted_model_of_an_unknown_family_is_a_failure() -> None:
    source = FakeSource()
    source.write("a", family="video")
    source.errors["a"] = ConfigError("models of the family video are not served")

    async def test(registry: Registry) -> None:
        assert list(registry.startup_failures()) == ["a"]

    run(source, test, start=["a"])


def test_closing_does_not_wait_for_a_load_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "CLOSE_TIMEOUT_S", 0.01)
    source = FakeSource("a", "b")

    async def test(registry: Registry) -> None:
        gate = source.hold("b")
        loading = asyncio.create_task(registry.load("b"))
        await until(lambda: "b" in source.loaded_names())
        await registry.close()
        assert not loading.done()
        gate.set()
        with pytest.raises(ModelNotReady, match="the server is shutting down"):
            await loading

    run(source, test, start=["a"])


# Everything at once

NAMES = ("a", "b", "inner", "outer")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["load", "reload", "override", "unload", "unload_dependents", "infer", "write", "poll", "pause"]
        ),
        st.sampled_from(NAMES),
    ),
    max_size=60,
)


@given(steps=STEPS, max_loads=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_nothing_gets_stuck_and_every_call_is_answered_by_a_load_that_was_current(
    steps: list[tuple[str, str]], max_loads: int
) -> None:
    source = FakeSource("a", "b", inner=["a"], outer=["inner", "b"])

    async def step(registry: Registry, action: str, name: str) -> None:
        match action:
            case "load":
                await registry.load(name, only_if_changed=True)
            case "reload":
                await registry.load(name)
            case "override":
                await registry.load(name, OVERRIDE if name in "ab" else made_of("a"))
            case "unload":
                await registry.unload(name)
            case "unload_dependents":
                await registry.unload(name, unload_dependents=True)
            case "infer":
                current = await edition(registry, name)
                assert isinstance(current, int)
                assert source.loads[current - 1][0] == name
            case "write":
                source.write(name, depends_on=source.facts[name].depends_on)
            case "poll":
                await registry.poll()

    async def test(registry: Registry) -> None:
        tasks = []
        for action, name in steps:
            tasks.append(asyncio.create_task(step(registry, action, name)))
            if action == "pause":
                await asyncio.sleep(0.001)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, ModelNotReady), result
        for name in NAMES:
            await registry.load(name)
        for name in NAMES:
            await edition(registry, name)
        assert set(states(registry).values()) == {"READY"}

    run(source, test, max_loads=max_loads)


def test_calls_during_reloads_are_all_answered() -> None:
    source = FakeSource("a", outer=["a"])

    async def test(registry: Registry) -> None:
        is_over = False
        editions: list[object] = []

        async def client(name: str) -> None:
            while not is_over:
                editions.append(await edition(registry, name))
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client(name)) for name in ("a", "outer") for _ in range(3)]
        for _ in range(50):
            source.write("a")
            await registry.load("outer", only_if_changed=True)
        is_over = True
        await asyncio.gather(*clients)
        assert len(source.loads) == 102
        assert len(set(editions)) > 10

    run(source, test)
