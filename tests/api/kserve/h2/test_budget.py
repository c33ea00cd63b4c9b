import pytest

from sardonyx.api.kserve.h2.budget import Budget
from sardonyx.api.kserve.h2.frames import ConnectionFault, ErrorCode


def test_a_budget_is_spent_and_fills_up_again():
    budget = Budget(3, 2.0, 100.0)
    for _ in range(3):
        budget.spend(100.0)
    with pytest.raises(ConnectionFault) as raised:
        budget.spend(100.4)
    assert raised.value.code is ErrorCode.ENHANCE_YOUR_CALM
    budget.spend(100.5)
    for _ in range(3):
        budget.spend(1000.0)
    with pytest.raises(ConnectionFault):
        budget.spend(1000.0)
