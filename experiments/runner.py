"""Runs experiments: every arm on every seed, in parallel, keeping what is finished.

A file makes an `Experiment` of each of its questions and ends with

    if __name__ == "__main__":
        runner.main(__doc__, KNOWLEDGE, CONTEXT)

`python -m experiments.knowledge --seeds 5` then runs both, with `context` behind it only that one.
In --out_dir, NAME.jsonl has a line for every finished arm and seed, NAME.json the results, an arm a
line and each metric with its values of all seeds, and NAME.png the figure.
"""

import argparse
import inspect
import itertools
import json
import os
import signal
import time
import zlib
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data import files
from experiments import common, tables
from experiments.processes import in_processes

# What every arm's numbers follow from, beside its own file.
CORE = [*common.MADE_BY, common.ROOT / "sdft.py", Path(common.__file__)]


@dataclass
class Experiment:
    """One question: what is measured, and how it is shown.

    An arm is a row with fields: "arm" is its name, "rate" its learning rate if several are tried,
    "family" its method, and all others are arguments of `measure`. The results have every field but
    "settings", which may hold functions.
    """

    name: str  # of its results, and of its part of the README
    arms: list  # of dicts
    measure: Callable  # measure(seed, **fields) -> {metric: number}, one arm on one seed
    columns: list  # the metrics of its table; the results have them all
    bases: tuple = (dict(world="skills"),)  # that it needs, as arguments of common.base
    choose_by: tuple = ("val new", "val prior")  # the metrics by which an arm's rate is chosen
    derive: Callable = None  # derive({arm: metrics}) adds to them what its claims compare
    figure: Callable = None  # figure(rows, plt) -> a matplotlib figure, of the results' rows
    arguments: Callable = None  # arguments(parser) adds flags, which measure finds in `options`
    files: list = ()  # paths of other code and data that its numbers follow from
    once: tuple = ()  # names of costly arms: last, on seed 0 alone, not with --quick
    quick: tuple = ()  # names of the arms that --quick runs, if not all
    then_columns: tuple = ()  # of a second table, with the arms that have these metrics


def main(doc, *experiments, argv=None):
    """The command line of a file's experiments: results, table and figure of each."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends like Ctrl-C
    go_on = "interrupted; the same command goes on after the last finished arm"
    with files.errors_in_a_sentence(go_on):
        args = parse_args(doc, experiments, argv)
        try:
            for experiment in [e for e in experiments if e.name in args.names]:
                rows = run(experiment, args)
                print("\n" + "\n".join(tables.table(rows, experiment.columns)) + "\n")
                if experiment.figure:
                    tables.draw(experiment.figure, rows, args.out_dir / f"{experiment.name}.png")
        except (torch.cuda.OutOfMemoryError, BrokenProcessPool):  # a GPU's memory, or the machine's
            remedy = "the same command goes on with fewer --jobs"
            raise ValueError(f"the memory is full; {remedy}") from None


def parse_args(doc, experiments, argv):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=doc, formatter_class=raw)
    names = [e.name for e in experiments]
    p.add_argument("names", nargs="*", default=names, help="only these: " + ", ".join(names))
    p.add_argument("--seeds", type=int, default=1, help="run seeds 0, 1, ... (default: 1)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at the same time")
    p.add_argument("--out_dir", type=Path, default="out/experiments", help="for all that it writes")
    p.add_argument("--quick", action="store_true", help="few updates, to see that it runs")
    p.set_defaults(threads=1)  # so that results do not depend on the number of cores
    for add_flags in {e.arguments for e in experiments if e.arguments}:
        add_flags(p)
    args = p.parse_args(argv)
    if not set(args.names) <= set(names) or args.seeds < 1 or args.jobs < 1:
        p.error(f"--seeds and --jobs are at least 1, names among {', '.join(names)}")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    return args


def run(experiment, args):
    """The experiment's rows, also in NAME.json. What its log has already is not run again."""
    planned, log = plan(experiment, args), args.out_dir / f"{experiment.name}.jsonl"
    rows, _ = files.read(log) if log.exists() else ([], 0)
    finished = {(row.get("key"), row.get("seed")): row for row in rows}
    todo = [(arm, key, seed) for arm, key, seed in planned if (key, seed) not in finished]
    print(f"{experiment.name}: {len(planned)} runs, {len(todo)} to do", flush=True)
    # The bases first, so that no two processes make the same one.
    seeds = sorted({seed for _, _, seed in todo})
    bases = [(make_base, seed, base) for base in experiment.bases for seed in seeds]
    tasks, set_up = [(run_arm, experiment.measure, *run) for run in todo], partial(prepare, args)
    for _ in in_processes(bases, args.jobs, set_up):
        pass
    start = time.perf_counter()
    for n, row in enumerate(in_processes(tasks, args.jobs, set_up), 1):
        finished[row["key"], row["seed"]] = row
        with open(log, "a", encoding="utf-8") as f:
            # The newline comes first: a line that was cut short must not take this one with it.
            f.write("\n" + json.dumps(row))
        found = [f"{c} {row['metrics'][c]:.2f}" for c in experiment.columns if c in row["metrics"]]
        left = (time.perf_counter() - start) / n * (len(todo) - n)
        about = f"{n:4}/{len(todo)}  seed {row['seed']}  {row['arm']:28} {'  '.join(found[:3])}"
        print(f"{about}  {row['seconds']:.0f} s  ({left:.0f} s left)", flush=True)
    table = {}
    for arm, key, seed in planned:
        fields = {k: v for k, v in arm.items() if k != "settings"}
        row = table.setdefault(key, fields | {"seconds": [], "metrics": {}})
        row["seconds"].append(finished[key, seed]["seconds"])
        for name, value in finished[key, seed]["metrics"].items():
            row["metrics"].setdefault(name, []).append(value)
    rows = [*table.values()]
    seconds = round(sum(sum(row["seconds"]) for row in rows))
    about = dict(experiment=experiment.name, seeds=[*range(args.seeds)], seconds=seconds)
    about |= files.machine(getattr(args, "device", "cpu")) | dict(threads=args.threads)
    tables.write(args.out_dir / f"{experiment.name}.json", about | {"rows": rows})
    return rows


def plan(experiment, args):
    """What is to be run: (arm, key, seed). The key changes with settings, flags, code and data."""
    arms, once = experiment.arms, experiment.once
    if args.quick:
        wanted = experiment.quick or {arm["arm"] for arm in arms} - set(once)
        arms = [arm for arm in arms if arm["arm"] in wanted]
    flags = {k: v for k, v in vars(args).items() if k not in ("names", "seeds", "jobs", "out_dir")}
    own_file = Path(inspect.getsourcefile(experiment.measure))
    code = common.code_of([*CORE, own_file, *experiment.files])
    planned = []
    for seed, arm in itertools.product(range(args.seeds), arms):
        text = json.dumps([code, flags, arm], default=lambda function: function.__qualname__)
        if seed == 0 or arm["arm"] not in once:
            planned.append((arm, zlib.crc32(text.encode()), seed))
    return sorted(planned, key=lambda run: run[0]["arm"] in once)


def prepare(args):
    """In every process: the options, and the number of threads."""
    vars(common.options).update(vars(args))
    torch.set_num_threads(args.threads or max(1, os.cpu_count() // args.jobs))


def make_base(seed, base):
    common.base(seed, **base)


def run_arm(measure, arm, key, seed):
    start = time.perf_counter()
    fields = {k: v for k, v in arm.items() if k not in ("arm", "rate", "family")}
    metrics = {k: round(float(v), 5) for k, v in measure(seed, **fields).items()}
    seconds = round(time.perf_counter() - start, 1)
    return dict(arm=tables.label(arm), key=key, seed=seed, seconds=seconds, metrics=metrics)
