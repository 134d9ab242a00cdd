"""Tasks in processes of their own, which end together."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed


def in_processes(tasks, jobs, set_up):
    """Results of (function, *arguments) as they finish. set_up() comes first in every process."""
    if jobs == 1 or len(tasks) < 2:
        set_up()
        yield from (function(*arguments) for function, *arguments in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, start_worker, [set_up]) as pool:
        try:
            for future in as_completed([pool.submit(*task) for task in tasks]):
                yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def start_worker(set_up):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=end_with_parent, daemon=True).start()
    set_up()


def end_with_parent():
    """Whatever kills the parent, no worker is left behind."""
    multiprocessing.parent_process().join()
    os._exit(1)
