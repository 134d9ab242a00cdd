"""Tasks in processes of their own, which end together."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch

from experiments import common


def in_processes(tasks, args):
    """Results of (function, *arguments) as they finish."""
    if args.jobs == 1 or len(tasks) < 2:
        set_up(args)
        yield from (function(*arguments) for function, *arguments in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, start_worker, [args]) as pool:
        try:
            for future in as_completed([pool.submit(*task) for task in tasks]):
                yield future.result()
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def set_up(args):
    vars(common.options).update(vars(args))
    torch.set_num_threads(args.threads or max(1, os.cpu_count() // args.jobs))


def start_worker(args):
    set_up(args)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Whatever kills the parent, no worker is left behind."""
    multiprocessing.parent_process().join()
    os._exit(1)
