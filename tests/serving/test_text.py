import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.fakes import Script, Served, serving, spell, until

from sardonyx.core import FinishReason, SamplingParams, Sequence
from sardonyx.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelNotReady,
    Overloaded,
    RequestAborted,
    UnsupportedFeature,
)
from sardonyx.serving.admission import Admission
from sardonyx.serving.text import GenerationOptions, TextLimits

EOS = 0
LETTERS = spell(list(range(69, 95)))
"""``abc...z`` again and again, for every sequence."""


def run(folder: Path, script: Script, test: Callable[[Served], Awaitable[None]], **options: object) -> None:
    """Run a test on a served model; afterwards nothing may be left."""

    async def main() -> None:
        async with serving(folder, script, **options) as served:
            await test(served)
            await served.finish()
            served.assert_idle()

    asyncio.run(main())


def pause_at(served: Served, num_tokens: int) -> None:
    """Steps wait, once, when a sequence has so many tokens, until the gate is opened."""

    def script(sequence: Sequence) -> int:
        if sequence.num_completion_tokens == num_tokens:
            served.runner.gate.clear()
            served.runner.script = LETTERS
        return LETTERS(sequence)

    served.runner.script = script


def test_chunks_make_the_text_and_usage_counts_tokens(folder: Path) -> None:
    async def test(served: Served) -> None:
        generation = await served.model.start(["the cat"], GenerationOptions(max_tokens=30), request_id="r")
        chunks = [chunk async for chunk in generation]
        assert "".join(chunk.text for chunk in chunks) == "abcdefghijklmnopqrstuvwxyzabcd"
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.LENGTH]
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (5, 30)

    run(folder, LETTERS, test)


def test_choices_are_prompt_major_and_differ_in_their_seeds(folder: Path) -> None:
    def script(sequence: Sequence) -> int:
        assert sequence.request.sampling.seed is not None
        return [*sequence.request.prompt_ids[-1:], 69 + sequence.request.sampling.seed][
            min(1, sequence.num_completion_tokens)
        ]

    async def test(served: Served) -> None:
        options = GenerationOptions(max_tokens=2, n=3, sampling=SamplingParams(seed=4))
        generation = await served.model.start(["x", served.ids("y")], options, request_id="r")
        choices = await generation.collect()
        assert [(each.index, each.text) for each in choices] == list(enumerate(["xe", "xf", "xg", "ye", "yf", "yg"]))
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (2, 12)

    run(folder, script, test)


def test_best_of_returns_the_likeliest_choices_without_asking_for_log_probabilities(folder: Path) -> None:
    def script(sequence: Sequence) -> int:
        return 69 + (sequence.request.sampling.seed or 0)

    async def test(served: Served) -> None:
        start = served.model.start
        options = GenerationOptions(max_tokens=3, n=4, sampling=SamplingParams(seed=0, num_logprobs=0))
        every = await (await start(["x"], options, request_id="a")).collect()
        means = {each.text: sum(token.logprob for token in each.tokens) for each in every}
        likeliest = sorted(means, key=lambda text: means[text], reverse=True)
        options = GenerationOptions(max_tokens=3, n=2, best_of=4, sampling=SamplingParams(seed=0))
        generation = await start(["x"], options, request_id="b")
        choices = await generation.collect()
        assert [(each.index, each.text, each.tokens) for each in choices] == [
            (0, likeliest[0], []),
            (1, likeliest[1], []),
        ]
        assert generation.usage.completion_tokens == 12

    run(folder, script, test)


def test_scoring_gives_one_generated_entry_even_when_it_is_the_end_token(folder: Path) -> None:
    """What lm-evaluation-harness reads: echo, logprobs, max_tokens 1."""

    async def test(served: Served) -> None:
        ids = served.ids("the cat sat")
        options = GenerationOptions(max_tokens=1, num_prompt_logprobs=1, sampling=SamplingParams(num_logprobs=1))
        generation = await served.model.start([ids, ids[:4]], options, request_id="r")
        choices = await generation.collect()
        for prompt, choice in zip(generation.prompts, choices, strict=True):
            assert prompt.logprobs is not None
            assert len(prompt.logprobs) + len(choice.tokens) == len(prompt.token_ids) + 1
            assert prompt.logprobs[0] is None
            assert [each.token_id for each in prompt.logprobs if each] == prompt.token_ids[1:]
            assert all(
                each.logprob == {top[0]: top[3] for top in each.top}[each.token_id]
                for each in [*prompt.logprobs, *choice.tokens]
                if each
            )
            assert (choice.token_ids, choice.text, choice.finish_reason) == ([EOS], "", FinishReason.STOP)
        assert generation.prompts[0].text == "the cat sat"

    run(folder, spell([EOS]), test)


def test_prompt_log_probabilities_come_with_the_first_chunk_of_each_choice(folder: Path) -> None:
    async def test(served: Served) -> None:
        prompt = [70 + n % 20 for n in range(150)]  # three chunks; the second choice could take it from the cache
        options = GenerationOptions(max_tokens=3, n=2, num_prompt_logprobs=0)
        generation = await served.model.start([prompt, prompt[:1]], options, request_id="r")
        async for chunk in generation:
            logprobs = generation.prompts[chunk.index // 2].logprobs
            assert logprobs is not None
            assert len(logprobs) == (150 if chunk.index < 2 else 1)

    run(folder, LETTERS, test)


def test_max_tokens_0_scores_the_prompt_and_generates_nothing(folder: Path) -> None:
    async def test(served: Served) -> None:
        options = GenerationOptions(max_tokens=0, num_prompt_logprobs=0, n=2)
        generation = await served.model.start(["the cat"], options, request_id="r")
        choices = await generation.collect()
        assert [(each.text, each.token_ids, each.finish_reason) for each in choices] == [
            ("", [], FinishReason.LENGTH)
        ] * 2
        assert generation.prompts[0].logprobs is not None

    run(folder, LETTERS, test)


def test_max_tokens_0_without_scores_costs_no_step(folder: Path) -> None:
    async def test(served: Served) -> None:
        generation = await served.model.start(["the cat"], GenerationOptions(max_tokens=0), request_id="r")
        assert [chunk.finish_reason async for chunk in generation] == [FinishReason.LENGTH]
        assert served.engine.num_steps == 0

    run(folder, LETTERS, test)


def test_a_stop_string_ends_the_sequence_in_the_engine_and_later_tokens_are_ignored(folder: Path) -> None:
    async def test(served: Served) -> None:
        pause_at(served, 20)
        options = GenerationOptions(max_tokens=100, stop=("fgh",))
        generation = await served.model.start(["x"], options, request_id="r")
        (choice,) = await generation.collect()
        assert (choice.text, choice.stop_reason, len(choice.token_ids)) == ("abcde", "fgh", 8)
        assert generation.usage.completion_tokens == 8
        served.runner.gate.set()
        await served.finish()
        assert len(served.runner.batches) <= 22

    run(folder, LETTERS, test)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.text("abcdef", min_size=1, max_size=3), max_size=3), n=st.integers(1, 3))
def test_usage_is_the_sum_of_the_choices_tokens_whatever_ends_them(folder: Path, stops: list[str], n: int) -> None:
    async def test(served: Served) -> None:
        options = GenerationOptions(max_tokens=9, stop=tuple(stops), n=n)
        generation = await served.model.start(["x", "yy"], options, request_id="r")
        choices = await generation.collect()
        assert generation.usage.completion_tokens == sum(len(each.token_ids) for each in choices)
        for choice in choices:
            ends = [("abcdefghi".find(stop) + len(stop), stop) for stop in stops if stop in "abcdefghi"]
            num_tokens = min(ends)[0] if ends else 9
            assert len(choice.token_ids) == num_tokens
            assert choice.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)

    run(folder, LETTERS, test)


def test_a_slow_reader_gets_one_merged_chunk_for_each_choice(folder: Path) -> None:
    async def test(served: Served) -> None:
        generation = await served.model.start(["x"], GenerationOptions(max_tokens=20, n=2), request_id="r")
        chunks = aiter(generation)
        await anext(chunks)
        await served.finish()
        rest = [chunk async for chunk in chunks]
        assert len(rest) <= 4
        assert all(chunk.finish_reason for chunk in rest[-2:])

    run(folder, LETTERS, test)


def test_a_cached_prompt_is_counted_once_for_its_choices(folder: Path) -> None:
    async def test(served: Served) -> None:
        prompt = [70 + n % 20 for n in range(100)]
        for request_id, num_cached in (("a", 0), ("b", 99)):
            options = GenerationOptions(max_tokens=1, n=2)
            generation = await served.model.start([prompt], options, request_id=request_id)
            await generation.collect()
            assert generation.usage.cached_tokens == num_cached

    run(folder, LETTERS, test)


def test_an_empty_prompt_becomes_the_token_that_begins_texts(folder: Path) -> None:
    async def test(served: Served) -> None:
        generation = await served.model.start(["", []], GenerationOptions(max_tokens=1), request_id="r")
        await generation.collect()
        bos = [served.tokenizer.bos_token_id]
        assert [(prompt.token_ids, prompt.text) for prompt in generation.prompts] == [(bos, ""), (bos, "")]

    run(folder, LETTERS, test)


def test_long_prompts_lose_their_beginning_where_asked_for(folder: Path) -> None:
    async def test(served: Served) -> None:
        ids = [70 + n % 20 for n in range(300)]
        for request_id, limit, max_tokens, kept in (("a", 10, 5, 10), ("b", -1, 56, 200), ("c", 400, 5, None)):
            options = GenerationOptions(max_tokens=max_tokens, truncate_prompt_tokens=limit)
            if kept is None:
                with pytest.raises(ContextLengthExceeded):
                    await served.model.start([ids], options, request_id=request_id)
                continue
            generation = await served.model.start([ids], options, request_id=request_id)
            await generation.collect()
            assert generation.prompts[0].token_ids == ids[-kept:]
            assert generation.prompts[0].text == served.tokenizer.decode(ids[-kept:])

    run(folder, LETTERS, test)


def test_without_max_tokens_the_completion_fills_the_context(folder: Path) -> None:
    async def test(served: Served) -> None:
        generation = await served.model.start([[70] * 200], GenerationOptions(), request_id="r")
        await generation.collect()
        assert generation.usage.completion_tokens == 56

    run(folder, LETTERS, test)


def test_requests_that_cannot_be_served_are_refused_with_their_numbers(folder: Path) -> None:
    options = GenerationOptions(max_tokens=10)
    cases: list[tuple[list[str | list[int]], GenerationOptions, type[InvalidRequest], str]] = [
        ([], options, InvalidRequest, "at least one prompt"),
        ([[70] * 250], options, ContextLengthExceeded, r"256 tokens, but 260 .*\(250 in the prompt, 10 for"),
        ([[70] * 256], GenerationOptions(), ContextLengthExceeded, "257 were requested"),
        (["x" * 2049], options, ContextLengthExceeded, "2,049 bytes .*at most 2,048"),
        ([[70, 100_000]], options, InvalidRequest, "100000 is outside of the model's vocabulary"),
        ([[-1]], options, InvalidRequest, "-1 is outside"),
        (["x"], GenerationOptions(sampling=SamplingParams(logit_bias={100_000: 1.0})), InvalidRequest, "outside"),
        (["x"], GenerationOptions(stop_token_ids=(100_000,)), InvalidRequest, "outside"),
        (["x", "y"], GenerationOptions(max_tokens=1, n=5), InvalidRequest, "10 choices .* at most 8"),
        (["x"], GenerationOptions(max_tokens=1, n=1, best_of=9), InvalidRequest, "9 choices"),
        (["\ud800"], options, InvalidRequest, "surrogate"),
    ]

    async def test(served: Served) -> None:
        for prompts, wanted, kind, message in cases:
            with pytest.raises(kind, match=message):
                await served.model.start(prompts, wanted, request_id="r")
            served.assert_idle()
        assert served.engine.num_steps == 0

    run(folder, LETTERS, test, limits=TextLimits(max_choices=8))


def test_an_id_that_is_in_use_is_refused(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        first = await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id="r")
        with pytest.raises(InvalidRequest, match="under way"):
            await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id="r")
        served.runner.gate.set()
        assert len(await first.collect()) == 1

    run(folder, LETTERS, test)


def test_an_id_can_come_again_at_once_after_an_abort(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        first = await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id="r")
        first.abort()
        second = await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id="r")
        served.runner.gate.set()
        (choice,) = await second.collect()
        assert choice.text == "abc"

    run(folder, LETTERS, test)


def test_more_than_admission_takes_is_refused_before_tokenising(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        first = await served.model.start(["x"], GenerationOptions(max_tokens=3, n=3), request_id="a")
        with pytest.raises(Overloaded):
            await served.model.start(["x", "y"], GenerationOptions(max_tokens=3), request_id="b")
        first.abort()
        served.runner.gate.set()
        await (await served.model.start(["x", "y"], GenerationOptions(max_tokens=3), request_id="c")).collect()

    run(folder, LETTERS, test, admission=Admission(4, 1000))


def test_chats_go_through_the_models_template(folder: Path) -> None:
    messages = [{"role": "user", "content": "hi <|im_end|>"}]

    async def test(served: Served) -> None:
        generation = await served.model.start_chat(messages, GenerationOptions(max_tokens=3), request_id="r")
        await generation.collect()
        text = "<|im_start|>user\nhi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
        assert generation.prompts[0].text == text
        assert await served.model.render_chat(messages) == text
        ids = generation.prompts[0].token_ids
        assert await served.model.tokenize_chat(messages) == ids
        im_end = served.tokenizer.token_id("<|im_end|>")
        assert ids.count(im_end or -1) == 1  # the caller's own is only text
        assert await served.model.detokenize(ids) == text

    run(folder, LETTERS, test)


def test_a_chat_whose_prompt_is_too_long_names_the_messages(folder: Path) -> None:
    async def test(served: Served) -> None:
        for content in ("x" * 300, "x" * 3000):
            with pytest.raises(ContextLengthExceeded) as caught:
                await served.model.start_chat(
                    [{"role": "user", "content": content}], GenerationOptions(), request_id="r"
                )
            assert caught.value.param == "messages"

    run(folder, LETTERS, test)


def test_a_model_without_a_template_takes_no_chats(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.model.chat_template = None
        with pytest.raises(UnsupportedFeature):
            await served.model.start_chat([{"role": "user", "content": "x"}], GenerationOptions(), request_id="r")

    run(folder, LETTERS, test)


def test_texts_to_tokenise_are_bounded(folder: Path) -> None:
    async def test(served: Served) -> None:
        assert await served.model.tokenize("the", add_special_tokens=False) == served.ids("the")
        with pytest.raises(InvalidRequest, match="1,048,576 bytes"):
            await served.model.tokenize("é" * (1 << 19) + "x")

    run(folder, LETTERS, test)


def test_a_failed_step_ends_its_requests_and_the_next_one_works(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.error = EngineError("the session failed")
        generation = await served.model.start(["x", "y"], GenerationOptions(max_tokens=3), request_id="a")
        with pytest.raises(EngineError, match="the session failed"):
            await generation.collect()
        served.runner.error = None
        (choice,) = await (await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id="b")).collect()
        assert choice.text == "abc"

    run(folder, LETTERS, test)


def test_a_dead_engine_ends_what_runs_and_refuses_what_comes(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        generations = [
            await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id=f"r{n}") for n in range(6)
        ]
        served.runner.error = RuntimeError("a bug")
        served.runner.gate.set()
        for generation in generations:
            with pytest.raises(EngineDead):
                async for _ in generation:
                    pass
        with pytest.raises(EngineDead):
            await served.model.start(["x"], GenerationOptions(max_tokens=3), request_id="late")
        assert not served.model.is_alive

    run(folder, LETTERS, test)


def test_a_stuck_step_does_not_outlive_the_deadline(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        options = GenerationOptions(max_tokens=3, timeout_s=0.05)
        generation = await served.model.start(["x"], options, request_id="r")
        with pytest.raises(DeadlineExceeded):
            await generation.collect()
        served.runner.gate.set()
        # Time that ran out is not the engine's error.
        assert ("request_success", ("abort",), 1) in list(served.metrics.rows())

    run(folder, LETTERS, test)


def test_the_servers_time_limit_bounds_the_callers(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        generation = await served.model.start(["x"], GenerationOptions(max_tokens=3, timeout_s=1e6), request_id="r")
        with pytest.raises(DeadlineExceeded):
            await anext(aiter(generation))
        served.runner.gate.set()

    run(folder, LETTERS, test, limits=TextLimits(request_timeout_s=0.05))


def test_who_waits_too_long_for_a_slot_is_refused(folder: Path) -> None:
    async def test(served: Served) -> None:
        pause_at(served, 5)
        first = await served.model.start(["x"], GenerationOptions(max_tokens=200), request_id="a")
        chunks = aiter(first)  # kept: an iterator that is dropped ends its generation
        await anext(chunks)
        await until(lambda: not served.runner.gate.is_set())
        second = await served.model.start(["y"], GenerationOptions(max_tokens=3), request_id="b")
        served.later_s = 61.0
        served.runner.gate.set()
        with pytest.raises(Overloaded):
            await second.collect()
        first.abort()

    run(folder, LETTERS, test, num_slots=1)


def test_who_waits_too_long_for_the_tokenizer_is_told(folder: Path) -> None:
    async def test(served: Served) -> None:
        with pytest.raises(DeadlineExceeded):
            await served.model.start(["y"], GenerationOptions(timeout_s=0.0), request_id="r")

    run(folder, LETTERS, test)


def test_a_closed_iterator_frees_its_slots(folder: Path) -> None:
    async def test(served: Served) -> None:
        pause_at(served, 5)
        generation = await served.model.start(["x"], GenerationOptions(max_tokens=200, n=4), request_id="r")
        chunks = aiter(generation)
        await anext(chunks)
        await chunks.aclose()  # type: ignore[attr-defined]
        assert served.model.num_active == 0
        assert served.admission.num_sequences == 0
        served.runner.gate.set()

    run(folder, LETTERS, test)


def test_abort_ends_choices_with_what_they_have_and_can_be_repeated(folder: Path) -> None:
    async def test(served: Served) -> None:
        pause_at(served, 5)
        generation = await served.model.start(["x"], GenerationOptions(max_tokens=200, n=2), request_id="r")
        chunks = aiter(generation)
        first = await anext(chunks)
        assert served.model.stop_generation("other") == 0
        assert served.model.stop_generation("r") == 1
        assert served.model.stop_generation() == 0
        generation.abort()
        served.runner.gate.set()
        rest = [chunk async for chunk in chunks]
        text = "".join(chunk.text for chunk in [first, *rest] if chunk.index == first.index)
        assert text.startswith("abc"[: len(text)])
        assert [chunk.finish_reason for chunk in rest][-2:] == [FinishReason.CANCELLED] * 2

    run(folder, LETTERS, test)


def test_a_prompt_that_was_stopped_before_it_was_scored_is_an_error(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        options = GenerationOptions(max_tokens=1, num_prompt_logprobs=1)
        generation = await served.model.start(["x"], options, request_id="r")
        served.model.stop_generation()
        with pytest.raises(RequestAborted):
            await generation.collect()
        served.runner.gate.set()

    run(folder, LETTERS, test)


def test_cancelling_while_the_tokenizer_works_leaves_nothing_behind(folder: Path) -> None:
    async def test(served: Served) -> None:
        tasks = [
            asyncio.create_task(served.model.start(["x"], GenerationOptions(max_tokens=3), request_id=f"r{n}"))
            for n in range(8)
        ]
        await asyncio.sleep(0)
        assert served.model.num_active == 8
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )

    run(folder, LETTERS, test)


def test_calls_cut_at_random_points_leave_every_slot_free(folder: Path) -> None:
    random_points = random.Random(7)

    async def client(served: Served, number: int) -> None:
        options = GenerationOptions(max_tokens=random_points.randint(1, 60), n=random_points.choice([1, 1, 2]))
        generation = await served.model.start(
            ["the cat"] * random_points.choice([1, 2]), options, request_id=f"r{number}"
        )
        try:
            if random_points.random() < 0.5:
                await generation.collect()
            else:
                async for _ in generation:
                    await asyncio.sleep(0)
        finally:
            generation.abort()

    async def test(served: Served) -> None:
        tasks = []
        for number in range(200):
            tasks.append(asyncio.create_task(client(served, number)))
            for _ in range(random_points.randint(0, 20)):
                await asyncio.sleep(0)
            victim = random_points.choice(tasks)
            victim.cancel()
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError | Overloaded) for result in results)

    run(folder, LETTERS, test)


def test_unloading_finishes_what_was_accepted_and_takes_nothing_new(folder: Path) -> None:
    async def test(served: Served) -> None:
        generation = await served.model.start(["x"], GenerationOptions(max_tokens=100), request_id="r")
        collecting = asyncio.create_task(generation.collect())
        draining = asyncio.create_task(served.model.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotReady):
            await served.model.start(["x"], GenerationOptions(), request_id="late")
        await draining
        assert len((await collecting)[0].token_ids) == 100

    run(folder, LETTERS, test)


def test_what_is_not_finished_when_the_model_closes_ends_with_an_error(folder: Path) -> None:
    async def test(served: Served) -> None:
        served.runner.gate.clear()
        generation = await served.model.start(["x"], GenerationOptions(max_tokens=100), request_id="r")
        await served.model.drain(0.01)
        served.runner.gate.set()
        await served.model.close()
        with pytest.raises(ModelNotReady):
            await generation.collect()
        assert served.runner.is_closed

    run(folder, LETTERS, test)


def test_one_line_is_logged_for_each_call_and_it_holds_no_text(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(served: Served) -> None:
        options = GenerationOptions(max_tokens=3)
        await (await served.model.start(["secret"], options, request_id="one")).collect()
        (await served.model.start(["secret"], GenerationOptions(), request_id="two")).abort()

    with caplog.at_level(logging.INFO, logger="sardonyx.serving"):
        run(folder, LETTERS, test)
    lines = [record for record in caplog.records if record.name.startswith("sardonyx.serving")]
    assert [record.__dict__["request_id"] for record in lines] == ["one", "two"]
    assert [record.__dict__["finish"] for record in lines] == ["length", "cancelled"]
    assert "secret" not in caplog.text
    assert lines[0].__dict__["completion_tokens"] == 3


def test_metrics_count_each_sequence_once(folder: Path) -> None:
    async def test(served: Served) -> None:
        await (await served.model.start(["x"], GenerationOptions(max_tokens=4, n=2), request_id="a")).collect()
        (await served.model.start(["x"], GenerationOptions(), request_id="b")).abort()
        rows = {(name, *labels): value for name, labels, value in served.metrics.rows()}
        assert rows["request_success", "length"] == 2
        assert rows["request_success", "abort"] == 1
        for name, count in (
            ("time_to_first_token_seconds", 2),
            ("inter_token_latency_seconds", 6),
            ("e2e_request_latency_seconds", 3),
            ("request_queue_time_seconds", 2),
        ):
            assert rows[(name,)].buckets()[-1][1] == count, name  # type: ignore[union-attr]

    run(folder, LETTERS, test)
