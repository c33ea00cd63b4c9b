"""Threads that leave the processor to others, for long steps beside which short ones should not wait.

Floor 2. On Linux a thread has a priority of its own, and those that it starts inherit it. Elsewhere nothing happens.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MODEST_NICENESS = 5
"""About a third of the weight that the scheduler gives to threads of normal priority. Of single sentences among longer
texts, on two shared cores: p99 18 to 31 ms instead of 31 to 55 ms, longer texts as before; 10 was no better."""
_MOST_NICE = 19


def be_modest() -> None:
    """Lower the priority of the calling thread, for good."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + MODEST_NICENESS
    with contextlib.suppress(PermissionError):  # sandboxes forbid it; then all threads are alike
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, _MOST_NICE))


def in_modest_thread(function: Callable[[], T]) -> T:
    """What a function gives that runs in a modest thread; threads that it starts are modest, too."""
    with ThreadPoolExecutor(1, thread_name_prefix="modest", initializer=be_modest) as pool:
        return pool.submit(function).result()
