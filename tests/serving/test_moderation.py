import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serving.fake_tasks import FakeClassifier, FakeImageClassifier

from sardonyx.errors import EngineError, Overloaded, UnsupportedFeature
from sardonyx.repository.encoder_config import CATEGORIES
from sardonyx.serving.moderation import ModerationItem, Moderator
from sardonyx.serving.tasks import CategoryRule


def judge(judges, *items, **options):
    return asyncio.run(Moderator(judges).judge(items, **options))


def text(*texts):
    return ModerationItem(texts=texts)


def rules(**labels):
    return {label: [CategoryRule(*pair) for pair in pairs] for label, pairs in labels.items()}


def test_a_label_speaks_for_its_categories_with_thresholds_of_their_own():
    judges = [FakeClassifier(rules=rules(threat=[("violence", 0.75), ("harassment/threatening", 0.25)]))]
    [verdict] = judge(judges, text("threat=0.5"))
    assert verdict.scores["violence"] == verdict.scores["harassment/threatening"] == 0.5
    assert not verdict.flags["violence"]
    assert verdict.flags["harassment/threatening"]
    assert verdict.is_flagged


def test_a_score_at_the_threshold_is_flagged():
    [verdict] = judge([FakeClassifier()], text("rude=0.5"))
    assert verdict.flags["harassment"]
    [verdict] = judge([FakeClassifier()], text("rude=0.49"))
    assert not verdict.is_flagged


def test_highest_score_of_labels_judges_and_parts_counts():
    judges = [
        FakeClassifier("a", rules(rude=[("harassment", 0.9)], mean=[("harassment", 0.9)])),
        FakeClassifier("b", rules(vile=[("harassment", 0.9)])),
    ]
    assert judge(judges, text("rude=0.25 mean=0.5"))[0].scores["harassment"] == 0.5
    assert judge(judges, text("rude=0.25", "vile=0.75", ""))[0].scores["harassment"] == 0.75


def test_a_category_is_flagged_by_any_rule_though_another_scores_higher():
    judges = [FakeClassifier(rules=rules(rude=[("hate", 0.9)], vile=[("hate", 0.2)]))]
    [verdict] = judge(judges, text("rude=0.75 vile=0.25"))
    assert verdict.scores["hate"] == 0.75
    assert verdict.flags["hate"]


def test_categories_that_nobody_judges_are_there_and_say_so():
    [verdict] = judge([FakeClassifier()], text("rude=1"))
    assert list(verdict.scores) == list(verdict.flags) == list(verdict.kinds) == list(CATEGORIES)
    assert verdict.kinds["harassment"] == ["text"]
    assert verdict.scores["sexual"] == 0
    assert verdict.flags["sexual"] is False
    assert verdict.kinds["sexual"] == []


def test_labels_without_a_rule_say_nothing():
    [verdict] = judge([FakeClassifier(labels=["calm", "rude"])], text("calm=1 rude=0.25"))
    assert verdict.scores["harassment"] == 0.25
    assert not verdict.is_flagged


def test_kinds_are_those_of_the_item():
    judges = [FakeClassifier(rules=rules(lewd=[("sexual", 0.5)])), FakeImageClassifier()]
    both = ModerationItem(texts=["lewd=0.25"], images=[b"nude=0.75"])
    verdicts = judge(judges, both, text("lewd=0.5"), ModerationItem(images=[b"nude=0.25"]))
    assert [verdict.kinds["sexual"] for verdict in verdicts] == [["text", "image"], ["text"], ["image"]]
    assert [verdict.scores["sexual"] for verdict in verdicts] == [0.75, 0.5, 0.25]


@given(st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=4), min_size=1, max_size=90))
def test_each_item_is_judged_by_its_own_parts_wherever_it_stands_in_the_batch(items):
    classifier = FakeClassifier(rules=rules(rude=[("hate", 0.5)]))
    verdicts = judge([classifier], *(text(*(f"rude={score}" for score in scores)) for scores in items))
    assert [verdict.scores["hate"] for verdict in verdicts] == [
        max(float(np.float32(score)) for score in scores) for scores in items
    ]
    assert len(classifier.calls) == 1


def test_a_judge_gets_everything_in_one_call_with_the_callers_time():
    classifier, pictures = FakeClassifier(), FakeImageClassifier()
    items = [text("a", "b"), ModerationItem(texts=["c"], images=[b"x"]), ModerationItem(images=[b"y", b"z"])]
    judge([classifier, pictures], *items, timeout_s=3.0)
    assert classifier.calls == [["a", "b", "c"]]
    assert pictures.calls == [[b"x", b"y", b"z"]]
    assert classifier.options[0].timeout_s == pictures.options[0].timeout_s == 3.0
    # Long texts are judged in windows: nothing asks for cutting them.
    assert classifier.options[0].truncate is None


def test_judges_without_anything_to_judge_are_not_asked():
    pictures = FakeImageClassifier()
    moderator = Moderator([FakeClassifier("b"), pictures, FakeClassifier("a")])
    asyncio.run(moderator.judge([text("x")]))
    assert pictures.calls == []
    assert moderator.names([text("x")]) == ["a", "b"]
    assert moderator.names([ModerationItem(images=[b"x"])]) == ["pictures"]


@pytest.mark.parametrize(
    ("judges", "item", "words"),
    [
        ([FakeClassifier("words")], ModerationItem(images=[b"x"]), "words judges text only"),
        ([FakeClassifier("words")], ModerationItem(texts=["a"], images=[b"x"]), "export an image classifier"),
        ([FakeImageClassifier()], text("a"), "pictures judges pictures only"),
        ([FakeClassifier("a"), FakeClassifier("b")], ModerationItem(images=[b"x"]), "the moderation models judge text"),
    ],
)
def test_nothing_passes_unjudged(judges, item, words):
    with pytest.raises(UnsupportedFeature, match=words) as caught:
        judge(judges, item)
    assert caught.value.param == "input"
    assert not any(each.calls for each in judges)


def test_one_judge_that_fails_fails_the_call_and_ends_the_others():
    async def run():
        slow, pictures, failing = FakeClassifier("a"), FakeImageClassifier(), FakeClassifier("b")
        slow.gate = pictures.gate = asyncio.Event()
        failing.error = Overloaded("the queue is full", retry_after_s=7.0)
        with pytest.raises(Overloaded) as caught:
            await Moderator([slow, pictures, failing]).judge([ModerationItem(texts=["x"], images=[b"y"])])
        assert caught.value.retry_after_s == 7.0
        assert slow.num_cancelled == pictures.num_cancelled == 1
        assert slow.num_under_way == pictures.num_under_way == 0

    asyncio.run(run())


def test_judges_work_at_the_same_time_and_end_with_the_call():
    async def run():
        judges = [FakeClassifier("a"), FakeClassifier("b"), FakeImageClassifier()]
        for each in judges:
            each.gate = asyncio.Event()
        task = asyncio.create_task(Moderator(judges).judge([ModerationItem(texts=["x"], images=[b"y"])]))
        async with asyncio.timeout(10):
            await asyncio.gather(*(each.entered.wait() for each in judges))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [each.num_cancelled for each in judges] == [1, 1, 1]

    asyncio.run(run())


def test_of_several_failures_the_first_is_told():
    judges = [FakeClassifier("a"), FakeClassifier("b")]
    judges[0].error, judges[1].error = EngineError("first"), EngineError("second")
    with pytest.raises(EngineError, match="first"):
        judge(judges, text("x"))
