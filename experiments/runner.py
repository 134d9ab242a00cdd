"""Runs an experiment: every arm on every seed, in parallel, keeping what is finished.

An experiment is a module of this package with

    ARMS      {label: settings}
    measure   measure(seed, **settings) -> {metric: number}, one arm on one seed
    COLUMNS   the metrics of its table (its JSON has them all)
    WORLDS    the bases that it needs, as arguments of `common.base`
    figure    optional: figure(rows, plt) -> a matplotlib figure
    arguments optional: arguments(parser) adds flags of its own, which measure finds in `common.options`
    inputs    optional: inputs(args) -> what its results follow from beside code and settings
    ONCE      optional: labels of arms that cost much: they run last, on seed 0 only, and not with --quick
"""

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

import model
import sdft
import train_toy
from data import toy
from experiments import common


def main(name, argv=None):
    """The experiment of that name: table, JSON and figure."""
    module = importlib.import_module(f"experiments.{name}")
    args = parse_args(module.__doc__, argv, getattr(module, "arguments", None))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process of an arm is left behind
    try:
        rows = run(name, module, args)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; the same command goes on after the last finished arm")
    except OSError as e:
        sys.exit(f"error: {e}")
    print("\n" + "\n".join(table(rows, module.COLUMNS)))
    if hasattr(module, "figure"):
        draw(module.figure, rows, args.out_dir / f"{name}.png")


def parse_args(doc, argv=None, more=None):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=1, help="run seeds 0, 1, ...; the README's tables have 5 (default: %(default)s)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, of one thread each (default: %(default)s)")
    p.add_argument("--out_dir", type=Path, default=Path("out/experiments"), help="for bases, logs and results (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="a few updates only, to see that everything runs; the numbers mean nothing")
    p.set_defaults(threads=1)  # so that results do not depend on the number of cores
    if more:
        more(p)
    args = p.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        p.error("--seeds and --jobs must be at least 1")
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        sys.exit(f"error: cannot write to --out_dir {args.out_dir} ({e.strerror}); name a folder that you may write to")
    return args


def run(name, module, args):
    """The experiment's rows, also in NAME.json. A line of NAME.jsonl is a finished arm, which is not run again unless its settings or the
    code behind it have changed."""
    log, seeds = args.out_dir / f"{name}.jsonl", range(args.seeds)
    code = fingerprint(module, args.quick, module.inputs(args) if hasattr(module, "inputs") else "")
    once = getattr(module, "ONCE", ())
    arms = [arm for arm in module.ARMS if not (args.quick and arm in once)]
    seeds_of = lambda arm: seeds[:1] if arm in once else seeds
    finished = {(row["arm"], row["seed"]): row for row in read(log) if row["code"] == code.get(row["arm"])}
    todo = [(seed, arm) for seed in seeds for arm in arms if seed in seeds_of(arm) and (arm, seed) not in finished]
    todo.sort(key=lambda pair: pair[1] in once)
    print(f"{name}: {len(arms)} arms on {args.seeds} seeds, {len(todo)} to run", flush=True)
    make_bases(sorted({seed for seed, _ in todo}), module.WORLDS, args)
    start = time.perf_counter()
    for i, row in enumerate(in_processes(run_arm, [(name, seed, arm) for seed, arm in todo], args), 1):
        finished[row["arm"], row["seed"]] = row | {"code": code[row["arm"]]}
        with open(log, "a") as f:
            f.write("\n" + json.dumps(finished[row["arm"], row["seed"]]))  # a line that was cut short must not take this one with it
        left = (time.perf_counter() - start) / i * (len(todo) - i)
        said = "  ".join(f"{k} {row['metrics'][k]:.2f}" for k in module.COLUMNS[:3] if k in row["metrics"])
        print(f"{i:4}/{len(todo)}  seed {row['seed']}  {row['arm']:26} {said}  {row['seconds']:.0f} s  ({left:.0f} s left)", flush=True)
    values = lambda arm, key: [finished[arm, seed][key] for seed in seeds_of(arm)]
    rows = [{"arm": a, "metrics": {m: [v[m] for v in values(a, "metrics")] for m in finished[a, 0]["metrics"]}} for a in arms]
    result = {"experiment": name, "seeds": [*seeds], "rows": rows, "seconds": round(sum(sum(values(a, "seconds")) for a in arms))}
    model.write_atomically(args.out_dir / f"{name}.json", lambda tmp: tmp.write_text(json.dumps(result, indent=1) + "\n"))
    return rows


def fingerprint(module, quick, inputs=""):
    """{arm: a number that changes with its settings, the code behind it and the experiment's own inputs}."""
    names = {str(getattr(value, "__module__", "")) for value in vars(module).values()}  # context.py uses a function of knowledge.py, say
    names = {n for n in names if n.startswith("experiments.")} - {module.__name__, "experiments.settings"}  # settings are in the arms
    others = [sys.modules[n] for n in sorted(names)]
    code = train_toy.fingerprint(*(inspect.getsource(part) for part in (module, *others, common, train_toy, sdft, model, toy)))
    say = lambda settings: json.dumps(settings, default=lambda function: function.__qualname__)
    return {arm: zlib.crc32(f"{code} {quick}{inputs} {say(settings)}".encode()) for arm, settings in module.ARMS.items()}


def read(log):
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            pass  # empty, or cut short by an interruption: that arm runs again
    return rows


# --- Processes ------------------------------------------------------------------------------------------------------


def set_up(args, worker=True):
    """In every process: the options and the number of threads."""
    vars(common.options).update(vars(args))
    torch.set_num_threads(args.threads or max(1, os.cpu_count() // args.jobs))  # None: all cores, shared out
    if worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's


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
    for _ in in_processes(make_base, [(seed, *world) for world in worlds for seed in seeds], args):
        pass


def make_base(seed, *world):
    common.base(seed, *world)


def run_arm(name, seed, arm):
    module, start = importlib.import_module(f"experiments.{name}"), time.perf_counter()
    metrics = {k: round(float(v), 5) for k, v in module.measure(seed, **module.ARMS[arm]).items()}
    return {"arm": arm, "seed": seed, "metrics": metrics, "seconds": round(time.perf_counter() - start, 1)}


# --- Table and figure -----------------------------------------------------------------------------------------------


def table(rows, columns):
    """Lines of Markdown: mean ± standard deviation over the seeds."""
    yield "| arm | " + " | ".join(columns) + " |"
    yield "|---" + "|---:" * len(columns) + "|"
    for row in rows:
        yield f"| {row['arm']} | " + " | ".join(mean_and_spread(row["metrics"].get(c)) for c in columns) + " |"


def mean_and_spread(values):
    """"0.94 ± 0.04"; one seed has no spread, and a count none either."""
    if not values:
        return ""
    if np.max(np.abs(values)) >= 1000:
        return f"{np.mean(values):,.0f}"
    if np.max(np.abs(values)) >= 100:
        return f"{np.mean(values):.0f} ± {np.std(values, ddof=1):.0f}" if len(values) > 1 else f"{values[0]:.0f}"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def draw(figure, rows, path):
    try:
        import matplotlib
    except ImportError:
        print("no figure: it needs matplotlib (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = figure(rows, plt)
    model.write_atomically(path, lambda tmp: drawn.savefig(tmp, format="png", dpi=150, bbox_inches="tight"))
    plt.close(drawn)
    print(f"wrote {path}")
