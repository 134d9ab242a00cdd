"""Every experiment, one after the other. Each result has its "seconds", summed over processes.

    python -m experiments.all --seeds 5

A finished arm is not run again: after an interruption, or for more seeds, give the same command.
"""

import importlib
import time

from experiments import runner

NAMES = [
    "sequential", "pareto", "knowledge", "context", "reasoning", "teacher", "teacher_weights", "kl", "on_policy", "scaling", "pass_at_k",
]  # fmt: skip


def main(argv=None):
    args, began = runner.parse_args(__doc__, argv), time.perf_counter()
    worlds = {world: None for name in NAMES for world in importlib.import_module(f"experiments.{name}").WORLDS}
    print(f"bases: {len(worlds)} for each of {args.seeds} seeds", flush=True)
    runner.make_bases(range(args.seeds), worlds, args)
    for i, name in enumerate(NAMES, 1):
        print(f"\n[{i}/{len(NAMES)}, {(time.perf_counter() - began) / 60:.0f} minutes so far]", flush=True)
        runner.main(name, argv)


if __name__ == "__main__":
    main()
