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


def nothing():
    pass


def prepare():
    os.environ["PREPARED"] = str(os.getpid())


def identify(x):
    return x, os.getpid(), os.environ["PREPARED"]


def wait_for_ever(name):
    Path(name).write_text(str(os.getpid()))
    time.sleep(200)


def test_every_task_is_done_once_in_a_process_that_is_set_up(monkeypatch):
    """With one job in this process, otherwise in others."""
    monkeypatch.setenv("PREPARED", "")
    tasks = [(identify, x) for x in range(4)]
    for jobs in (1, 2):
        results = [*processes.in_processes(tasks, jobs, prepare)]
        assert sorted(x for x, *_ in results) == [0, 1, 2, 3]
        assert all(prepared == str(pid) for _, pid, prepared in results)
        assert ({pid for _, pid, _ in results} == {os.getpid()}) == (jobs == 1)


def start_two(folder):
    tasks = [(wait_for_ever, str(folder / name)) for name in "01"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in processes.in_processes(tasks, 2, nothing):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_is_left_behind(number, tmp_path):
    """Neither by Ctrl-C nor by kill -9, which cannot be caught."""
    parent = multiprocessing.get_context("spawn").Process(target=start_two, args=[tmp_path])
    parent.start()
    names = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 120
    while not all(name.exists() and name.read_text() for name in names):
        assert time.monotonic() < deadline and parent.is_alive()
        time.sleep(0.05)
    os.kill(parent.pid, number)
    for name in names:
        while Path(f"/proc/{name.read_text()}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    parent.join()
