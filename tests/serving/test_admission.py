import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from sardonyx.errors import Overloaded
from sardonyx.serving.admission import Admission, Reservation, estimate_tokens


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(clock: Clock | None = None, jitter: float = 0.5, **limits: int) -> Admission:
    limits = {"max_sequences": 4, "max_tokens": 100} | limits
    return Admission(**limits, clock=clock or Clock(), jitter=lambda: jitter)


def test_requests_beyond_the_limit_of_sequences_are_refused_until_one_ends() -> None:
    admission = make()
    first = admission.reserve(3, 1)
    with pytest.raises(Overloaded, match="limit of 4 requests"):
        admission.reserve(2, 1)
    first.release()
    admission.reserve(2, 1)


def test_requests_beyond_the_limit_of_tokens_are_refused() -> None:
    admission = make()
    admission.reserve(1, 60)
    with pytest.raises(Overloaded, match="limit of 100 queued prompt tokens"):
        admission.reserve(1, 41)
    admission.reserve(1, 40)


def test_a_request_larger_than_every_limit_is_admitted_when_nothing_else_is() -> None:
    admission = make()
    huge = admission.reserve(50, 10_000)
    with pytest.raises(Overloaded):
        admission.reserve(1, 1)
    huge.release()
    admission.reserve(1, 1)


def test_an_estimate_that_was_too_low_is_refused_after_counting_when_it_does_not_fit() -> None:
    admission = make()
    admission.reserve(1, 90)
    second = admission.reserve(1, 5)
    with pytest.raises(Overloaded):
        second.correct(11)
    assert admission.num_tokens == 95
    second.correct(10)
    assert admission.num_tokens == 100


def test_an_estimate_that_was_too_low_is_corrected_when_nothing_else_is_admitted() -> None:
    admission = make()
    admission.reserve(1, 5).correct(5_000)
    assert admission.num_tokens == 5_000


def test_a_released_reservation_can_be_released_and_corrected_again_without_effect() -> None:
    admission = make()
    reservation = admission.reserve(1, 5)
    reservation.release()
    reservation.correct(50)
    reservation.release()
    assert (admission.num_sequences, admission.num_tokens) == (0, 0)


def test_refusals_are_counted_by_limit() -> None:
    refused: list[str] = []
    admission = Admission(1, 10, on_reject=refused.append)
    admission.reserve(1, 10)
    with pytest.raises(Overloaded):
        admission.reserve(1, 1)
    assert refused == ["requests"]


def test_retry_after_is_the_queue_at_the_measured_speed() -> None:
    clock = Clock()
    admission = make(clock)
    served = admission.reserve(1, 50)
    clock.now_s = 5.0  # 10 tokens a second
    served.release(was_served=True)
    clock.now_s = 5_000.0  # an idle time changes nothing
    admission.reserve(1, 80)
    assert admission.retry_after_s() == pytest.approx(8.0)


def test_what_was_aborted_does_not_count_for_the_speed() -> None:
    clock = Clock()
    admission = make(clock)
    admission.reserve(1, 50)
    aborted = admission.reserve(1, 50)
    clock.now_s = 5.0
    aborted.release()
    assert admission.retry_after_s() == 1.0


@settings(deadline=None)
@given(jitter=st.floats(0, 1, exclude_max=True), busy_s=st.floats(1e-6, 1e6), queued=st.integers(0, 1 << 40))
def test_retry_after_stays_between_1_and_30_seconds(jitter: float, busy_s: float, queued: int) -> None:
    clock = Clock()
    admission = make(clock, jitter)
    served = admission.reserve(1, 100)
    clock.now_s = busy_s
    served.release(was_served=True)
    admission.reserve(1, queued)
    assert 1.0 <= admission.retry_after_s() <= 30.0


def test_estimates_are_a_quarter_of_the_bytes_and_at_least_1() -> None:
    assert [estimate_tokens(n) for n in (0, 1, 4, 5, 4_000)] == [1, 1, 1, 2, 1_000]


class Admissions(RuleBasedStateMachine):
    """Whatever comes in whatever order: the counts are those of the reservations held, and within the limits."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.admission = make(self.clock)
        self.held: dict[int, Reservation] = {}

    reservations = Bundle("reservations")

    @rule(target=reservations, sequences=st.integers(1, 6), tokens=st.integers(0, 150))
    def reserve(self, sequences: int, tokens: int) -> Reservation | None:
        admission = self.admission
        fits = admission.num_sequences + sequences <= 4 and admission.num_tokens + tokens <= 100
        try:
            reservation = admission.reserve(sequences, tokens)
        except Overloaded:
            assert self.held
            assert not fits
            return None
        assert fits or not self.held
        self.held[id(reservation)] = reservation
        return reservation

    @rule(reservation=reservations, tokens=st.integers(0, 150))
    def correct(self, reservation: Reservation | None, tokens: int) -> None:
        if reservation is not None:
            try:
                reservation.correct(tokens)
            except Overloaded:
                assert len(self.held) > 1

    @rule(reservation=consumes(reservations), was_served=st.booleans())
    def release(self, reservation: Reservation | None, was_served: bool) -> None:
        if reservation is not None:
            reservation.release(was_served=was_served)
            self.held.pop(id(reservation), None)

    @rule(passed_s=st.floats(0, 100))
    def wait(self, passed_s: float) -> None:
        self.clock.now_s += passed_s

    @invariant()
    def counts_are_those_of_what_is_held(self) -> None:
        held = self.held.values()
        assert self.admission.num_sequences == sum(each.num_sequences for each in held)
        assert self.admission.num_tokens == sum(each.num_tokens for each in held)

    @invariant()
    def limits_hold_unless_something_was_admitted_alone(self) -> None:
        if self.admission.num_sequences > 4 or self.admission.num_tokens > 100:
            assert any(each.num_sequences > 4 or each.num_tokens > 100 for each in self.held.values())


TestAdmissions = Admissions.TestCase
TestAdmissions.settings = settings(deadline=None)
