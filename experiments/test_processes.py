"""What processes.py guarantees: results as they come, and no process that outlives the command.

Light imports only: every process that these tests start makes them again.
"""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from experiments import processes


def prepare():
    os.environ["PREPARED"] = str(os.getpid())


def identify(x):
    return x, os.getpid(), os.environ["PREPARED"]


def test_every_task_is_done_once_in_another_process_that_is_set_up():
    """One job stays in this process, as in test_experiments.py, which notices if it did not."""
    results = [*processes.in_processes([(identify, x) for x in range(4)], 2, prepare)]
    assert sorted(x for x, *_ in results) == [0, 1, 2, 3]
    for _, pid, prepared in results:
        assert prepared == str(pid) and pid != os.getpid()


def wait_for_ever(path):
    path.write_text(str(os.getpid()))
    time.sleep(200)


def start_two(folder):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as runner.py does
    [*processes.in_processes([(wait_for_ever, folder / name) for name in "01"], 2, prepare)]


def wait_until(is_true):
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_is_left_behind(number, tmp_path):
    """Neither by Ctrl-C, which is treated like SIGTERM, nor by kill -9, which cannot be caught."""
    parent = multiprocessing.get_context("spawn").Process(target=start_two, args=[tmp_path])
    parent.start()
    paths = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(path.exists() and path.read_text() for path in paths))
    os.kill(parent.pid, number)
    wait_until(lambda: not any(Path(f"/proc/{path.read_text()}").exists() for path in paths))
    parent.join()
