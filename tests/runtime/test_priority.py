import os
import sys
import threading

import pytest

from sardonyx.runtime.priority import MODEST_NICENESS, in_modest_thread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="priorities are those of the process elsewhere")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def niceness_of_a_thread_within() -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(niceness()))
    thread.start()
    thread.join()
    return found[0]


def test_the_function_and_what_it_starts_are_modest_and_nobody_else() -> None:
    before = niceness()
    expected = min(before + MODEST_NICENESS, 19)
    assert in_modest_thread(niceness) == expected
    assert in_modest_thread(niceness_of_a_thread_within) == expected
    assert niceness() == before


def test_errors_reach_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        in_modest_thread(lambda: 1 // 0)
