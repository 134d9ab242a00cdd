"""Runs an experiment: every arm on every seed, in parallel, keeping what is finished.

An experiment is a module of this package with

    ARMS      {label: settings}
    measure   measure(seed, **settings) -> {metric: number}, one arm on one seed
    COLUMNS   the metrics of its table (its JSON has them all)
    WORLDS    the bases that it needs, as arguments of `common.base`
    figure    optional: figure(rows, plt) -> a matplotlib figure
    arguments optional: arguments(parser) adds flags, which measure finds in `common.options`
    inputs    optional: inputs(args) -> what its results follow from, beside code and settings
    ONCE      optional: labels of arms that cost much: last, on seed 0 only, not with --quick
    QUICK     optional: labels of the arms that --quick runs
"""

import argparse
import contextlib
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

import model
import sdft
import train_toy
from data import toy
from experiments import common


def main(name, argv=None):
    """The command line of the experiment of that name."""
    with errors_as_sentences():
        experiment(name, argv)


@contextlib.contextmanager
def errors_as_sentences():
    """What a user can mend ends with one sentence, an interruption with how to go on."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends like Ctrl-C
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on after the last finished arm")
    except (
        torch.cuda.OutOfMemoryError,
        BrokenProcessPool,
    ):  # the latter if the system ended a process
        sys.exit("error: the memory is full; the same command goes on with fewer --jobs")
    except (OSError, ValueError, FloatingPointError) as e:
        sys.exit(f"error: {e}")


def experiment(name, argv=None):
    """The experiment of that name: table, JSON and figure."""
    module = importlib.import_module(f"experiments.{name}")
    args = parse_args(module.__doc__, argv, getattr(module, "arguments", None))
    rows = run(name, module, args)
    print("\n" + "\n".join(table(rows, module.COLUMNS)))
    if hasattr(module, "figure"):
        draw(module.figure, rows, args.out_dir / f"{name}.png")


def parse_args(doc, argv=None, more=None):
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    p = argparse.ArgumentParser(description=doc, formatter_class=Help)
    p.add_argument(
        "--seeds", type=int, default=1, help="run seeds 0, 1, ... (README.md: 5; real_model 3)"
    )
    p.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes that share the cores"
    )
    out_dir = Path("out/experiments")
    p.add_argument("--out_dir", type=Path, default=out_dir, help="for bases, logs and results")
    p.add_argument("--quick", action="store_true", help="few updates, to see that it runs")
    p.set_defaults(threads=1)  # so that results do not depend on the number of cores
    if more:
        more(p)
    args = p.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        p.error("--seeds and --jobs must be at least 1")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OSError(
            f"cannot write to --out_dir {args.out_dir} ({e.strerror}); name another folder"
        ) from None
    return args


def run(name, module, args):
    """The experiment's rows, also in NAME.json.

    A line of NAME.jsonl is a finished arm, which is not run again unless its settings or the code
    behind it have changed.
    """
    log, seeds = args.out_dir / f"{name}.jsonl", range(args.seeds)
    inputs = module.inputs(args) if hasattr(module, "inputs") else ""
    code = fingerprint(module, args.quick, inputs)
    once = getattr(module, "ONCE", ())
    arms = [arm for arm in module.ARMS if not (args.quick and arm in once)]
    if args.quick:
        arms = getattr(module, "QUICK", arms)
    seeds_of = {arm: seeds[:1] if arm in once else seeds for arm in arms}
    finished = {(r["arm"], r["seed"]): r for r in read(log) if r["code"] == code.get(r["arm"])}
    todo = [(seed, arm) for seed in seeds for arm in arms if seed in seeds_of[arm]]
    todo = [(seed, arm) for seed, arm in todo if (arm, seed) not in finished]
    todo.sort(key=lambda pair: pair[1] in once)
    print(f"{name}: {len(arms)} arms on {args.seeds} seeds, {len(todo)} to run", flush=True)
    make_bases(sorted({seed for seed, _ in todo}), module.WORLDS, args)
    start = time.perf_counter()
    tasks = [(name, seed, arm) for seed, arm in todo]
    for i, row in enumerate(in_processes(run_arm, tasks, args), 1):
        row["code"] = code[row["arm"]]
        finished[row["arm"], row["seed"]] = row
        with open(log, "a", encoding="utf-8") as f:
            # The newline comes first: a line that was cut short must not take this one with it.
            f.write("\n" + json.dumps(row))
        left = (time.perf_counter() - start) / i * (len(todo) - i)
        print_progress(f"{i:4}/{len(todo)}", row, module.COLUMNS, left)

    rows, total = [], 0
    for arm in arms:
        per_seed = [finished[arm, seed] for seed in seeds_of[arm]]
        # A metric may be of some seeds only.
        metrics = {
            metric: [row["metrics"][metric] for row in per_seed if metric in row["metrics"]]
            for metric in per_seed[0]["metrics"]
        }
        rows.append({"arm": arm, "metrics": metrics})
        total += sum(row["seconds"] for row in per_seed)
    result = {"experiment": name, "seeds": [*seeds], "rows": rows, "seconds": round(total)}
    text = json.dumps(result, indent=1) + "\n"
    common.write_whole(args.out_dir / f"{name}.json", lambda tmp: tmp.write_text(text))
    return rows


def print_progress(count, row, columns, left):
    metrics = [f"{c} {row['metrics'][c]:.2f}" for c in columns[:3] if c in row["metrics"]]
    print(
        f"{count}  seed {row['seed']}  {row['arm']:26} {'  '.join(metrics)}  "
        f"{row['seconds']:.0f} s  ({left:.0f} s left)",
        flush=True,
    )


def fingerprint(module, quick, inputs=""):
    """{arm: a number}, which changes with its settings, the code behind it and its inputs."""
    # An experiment may use another one's functions, as context.py does, or data/scoring.py's.
    names = {str(getattr(value, "__module__", "")) for value in vars(module).values()}
    names = {n for n in names if n.startswith(("experiments.", "data."))}
    names -= {module.__name__, "experiments.settings"}  # the settings are in the arms
    parts = [module, *(sys.modules[n] for n in sorted(names)), common, train_toy, sdft, model, toy]
    code = common.fingerprint(*map(inspect.getsource, parts))
    numbers = {}
    for arm, settings in module.ARMS.items():
        text = json.dumps(settings, default=lambda function: function.__qualname__)
        numbers[arm] = zlib.crc32(f"{code} {quick}{inputs} {text}".encode())
    return numbers


def read(log):
    """The finished arms. One whose line is damaged, e.g. cut short, runs again."""
    rows = []
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            numbers = [row["seed"], row["code"], row["seconds"], *row["metrics"].values()]
            if row["metrics"] and isinstance(row["arm"], str) and np.isfinite(numbers).all():
                rows.append(row)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
    return rows


# --- Processes -----------------------------------------------------------------------------------


def set_up(args, worker=True):
    """In every process: the options and the number of threads."""
    vars(common.options).update(vars(args))
    shared_out = max(1, os.cpu_count() // args.jobs)
    torch.set_num_threads(args.threads or shared_out)
    if worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
        threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    """Whatever kills the parent, no worker is left behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def in_processes(task, arguments, args):
    """Results of task(*arguments) as they finish."""
    if args.jobs == 1 or len(arguments) < 2:
        set_up(args, worker=False)
        yield from (task(*a) for a in arguments)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(args.jobs, context, initializer=set_up, initargs=(args,))
    try:
        for future in as_completed([pool.submit(task, *a) for a in arguments]):
            yield future.result()
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def make_bases(seeds, worlds, args):
    """Before the arms, so that no two processes make the same one."""
    for _ in in_processes(make_base, [(s, *world) for world in worlds for s in seeds], args):
        pass


def make_base(seed, *world):
    common.base(seed, *world)


def run_arm(name, seed, arm):
    module, start = importlib.import_module(f"experiments.{name}"), time.perf_counter()
    metrics = module.measure(seed, **module.ARMS[arm])
    metrics = {metric: round(float(value), 5) for metric, value in metrics.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {"arm": arm, "seed": seed, "metrics": metrics, "seconds": seconds}


# --- Table and figure ----------------------------------------------------------------------------


def table(rows, columns):
    """Lines of Markdown: mean ± standard deviation over the seeds."""
    yield "| arm | " + " | ".join(columns) + " |"
    yield "|---" + "|---:" * len(columns) + "|"
    for row in rows:
        cells = [mean_and_spread(row["metrics"].get(c)) for c in columns]
        yield f"| {row['arm']} | " + " | ".join(cells) + " |"


def mean_and_spread(values):
    """The text "0.94 ± 0.04"; one seed has no spread. Large numbers get fewer digits."""
    if values is None or len(values) == 0:
        return ""
    mean, sd = mean_and_sd([values])
    largest = np.max(np.abs(values))
    if largest >= 1000:
        return f"{mean[0]:,.0f}"
    digits = 0 if largest >= 100 else 2
    spread = f" ± {sd[0]:.{digits}f}" if len(values) > 1 else ""
    return f"{mean[0]:.{digits}f}{spread}"


def mean_and_sd(values):
    """Mean and standard deviation of each list of seeds, (n, seeds) to (n,) twice."""
    values = np.array(values)
    return values.mean(1), values.std(1, ddof=values.shape[1] > 1)


def grid_and_legend(panel):
    """The legend stands beside the axes, where it hides nothing."""
    panel.grid(alpha=0.3)
    panel.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)


def draw(figure, rows, path):
    """Write figure(rows, plt) as a PNG, if matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure, since matplotlib is missing: pip install matplotlib")
        return
    plt.switch_backend("Agg")
    drawn = figure(rows, plt)
    save = dict(format="png", dpi=150, bbox_inches="tight")
    common.write_whole(path, lambda tmp: drawn.savefig(tmp, **save))
    plt.close(drawn)
    print(f"wrote {path}")
