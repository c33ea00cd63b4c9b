import pytest

from sardonyx.api.kserve.h2.frames import ConnectionFault, ErrorCode
from sardonyx.api.kserve.h2.streams import MAX_REMEMBERED, Streams


@pytest.fixture
def streams():
    streams = Streams()
    assert streams.takes(5)
    return streams


def refusal(act, *arguments, **options):
    with pytest.raises(ConnectionFault) as raised:
        act(*arguments, **options)
    return raised.value.code


def test_numbers_of_streams_are_odd_and_rise(streams):
    assert refusal(streams.takes, 6) is ErrorCode.PROTOCOL_ERROR
    assert refusal(streams.takes, 3) is ErrorCode.STREAM_CLOSED
    assert refusal(streams.takes, 5) is ErrorCode.STREAM_CLOSED
    assert streams.takes(7)
    assert streams.last_id == 7


def test_what_was_on_its_way_is_expected_until_its_end(streams):
    streams.end(5, is_sending=True)
    assert not streams.takes(5)
    assert streams.expects(5, is_last=False)
    assert streams.expects(5, is_last=True)
    assert not streams.expects(5, is_last=False)


def test_nothing_is_expected_of_a_finished_stream(streams):
    streams.end(5, is_sending=False)
    assert not streams.expects(5, is_last=False)


@pytest.mark.parametrize("stream_id", [0, 4, 7])
def test_streams_that_never_were_are_refused(streams, stream_id):
    assert refusal(streams.expects, stream_id, is_last=False) is ErrorCode.PROTOCOL_ERROR


def test_later_streams_are_passed_over_once_no_more_are_taken(streams):
    streams.is_closed = True
    assert not streams.takes(7)
    assert streams.last_id == 5
    assert streams.expects(7, is_last=False)


def test_only_so_many_are_remembered():
    streams = Streams()
    for stream_id in range(1, 2 * MAX_REMEMBERED + 3, 2):
        assert streams.takes(stream_id)
        streams.end(stream_id, is_sending=True)
    assert not streams.expects(1, is_last=False)
    assert streams.expects(3, is_last=False)
