from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from sardonyx.errors import InvalidRequest
from sardonyx.serving.call_parameters import convert_parameters


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    task: Literal["a", "b"] = "a"
    amount: Annotated[float, Meta(ge=0, le=1)] = 0.0
    flag: bool = False
    name: str | None = None


class Nothing(msgspec.Struct, frozen=True):
    pass


@pytest.mark.parametrize(
    "given",
    [
        {"task": "b", "amount": 0.5, "flag": True, "name": "x"},
        {"task": "b", "amount": "0.5", "flag": "true", "name": "x"},  # as gRPC may bring them
    ],
)
def test_numbers_and_truths_may_be_text(given):
    assert convert_parameters(given, Parameters, "a model") == Parameters(task="b", amount=0.5, flag=True, name="x")


def test_nothing_is_the_defaults():
    assert convert_parameters({}, Parameters, "a model") == Parameters()


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"tusk": "a"}, "tusk", "is no parameter of a model; there are task, amount, flag, name"),
        ({"x" * 500: 1}, "x" * 80, "is no parameter"),
        ({"task": "c"}, "task", "c"),
        ({"amount": 2}, "amount", "<= 1"),
        ({"amount": "much"}, "amount", "expected float, got str"),
        ({"flag": 3}, "flag", "expected bool"),
        ({"name": 3}, "name", "expected str, got int"),
    ],
)
def test_wrong_ones_are_refused_by_name(given, param, words):
    with pytest.raises(InvalidRequest) as caught:
        convert_parameters(given, Parameters, "a model")
    assert caught.value.param == param
    assert caught.value.message.startswith(f"{param}: ")
    assert words in caught.value.message


def test_where_there_are_none_it_is_said():
    with pytest.raises(InvalidRequest, match="there is none"):
        convert_parameters({"a": 1}, Nothing, "a model")
