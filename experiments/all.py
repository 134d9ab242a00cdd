"""Every experiment, one after the other. Each result has its "seconds", summed over processes.

    python -m experiments.all --seeds 5

A finished arm is not run again: after an interruption, or for more seeds, give the same command.
"""

import importlib
import time

from experiments import runner

NAMES = [
    "teacher",
    "pareto",
    "sequential",
    "demonstrations",
    "knowledge",
    "context",
    "reasoning",
    "controls",
    "cold_start",
    "on_policy",
    "kl",
    "estimators",
    "teacher_weights",
    "many_stages",
    "mismatch",
    "scaling",
    "pass_at_k",
]


def main(argv=None):
    with runner.errors_as_sentences():
        args, start = runner.parse_args(__doc__, argv), time.perf_counter()
        modules = [importlib.import_module(f"experiments.{name}") for name in NAMES]
        worlds = dict.fromkeys(world for module in modules for world in module.WORLDS)
        print(f"bases: {len(worlds)} for each of {args.seeds} seeds", flush=True)
        runner.make_bases(range(args.seeds), worlds, args)
        for i, name in enumerate(NAMES, 1):
            minutes = (time.perf_counter() - start) / 60
            print(f"\n[{i}/{len(NAMES)}, {minutes:.0f} minutes so far]", flush=True)
            runner.experiment(name, argv)


if __name__ == "__main__":
    main()
