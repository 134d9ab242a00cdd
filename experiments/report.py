"""Writes the tables of experiments/README.md from the results in experiments/results.

python -m experiments.report                  # rewrite the marked parts
python -m experiments.report out/experiments  # take over a finished run's results first
"""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from experiments import forgetting_law
from experiments.all import NAMES as ON_THE_TOY
from experiments.runner import table
from experiments.settings import chosen

HERE = Path(__file__).parent
RESULTS, FIGURES, README = HERE / "results", HERE / "figures", HERE / "README.md"
CLAIMING = [*ON_THE_TOY, "forgetting_law"]
NAMES = [*CLAIMING, "real_grid", "real_model", "real_controls"]
MISSING = "not measured yet"


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, nargs="?", help="--out_dir of a finished experiments.all")
    try:
        run = p.parse_args(argv).run
        if run:
            take_over(run)
        text = rewritten(README.read_text(encoding="utf-8"), load(RESULTS))
        README.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


def take_over(run):
    """Copy the results and figures of a finished run."""
    finished = [name for name in NAMES if (run / f"{name}.json").exists()]
    if not finished:
        command = f"python -m experiments.all --out_dir {run}"
        raise ValueError(f"there are no results in {run}; make them with: {command}")
    for name in finished:
        shutil.copy(run / f"{name}.json", RESULTS)
        if (run / f"{name}.png").exists():
            shutil.copy(run / f"{name}.png", FIGURES)


def load(folder):
    """The results in a folder: {experiment: content of its JSON file}."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def rewritten(text, results):
    """The README with fresh tables in its marked parts: <!-- NAME --> ... <!-- end -->."""
    parts = {name: experiment_table(results, name) for name in NAMES}
    for name, lines in ({"claims": claims_table(results)} | parts).items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        if text.count(start) != 1:
            raise ValueError(f"README.md has {text.count(start)} parts {start.strip()}, not one")
        before, rest = text.split(start)
        text = before + start + "\n".join(lines) + "\n" + rest[rest.index(end) :]
    return text


def experiment_table(results, name):
    """The experiment's table; of a sweep only what was chosen, and what was not swept."""
    if name not in results:
        return [MISSING]
    rows, module = results[name]["rows"], importlib.import_module(f"experiments.{name}")
    if name == "forgetting_law":
        return forgetting_law.table(rows)
    if hasattr(module, "SWEEP"):
        best = chosen(rows, *module.SWEEP).values()
        rows = [row for row in rows if " at " not in row["arm"] or row["arm"] in best]
    seeds, seconds = len(results[name]["seeds"]), results[name]["seconds"]
    cost = f"{seeds} seed{'s' * (seeds > 1)}"
    if hasattr(module, "ONCE"):
        cost += ", one where there is no ±"
    if not hasattr(module, "arguments"):  # with flags they run on more than one kind of machine
        cost += f"; {seconds:,} s in all, in processes of one thread"
    lines = [*table(rows, module.COLUMNS), ""]
    if turns := getattr(module, "TURNS", ()):  # what became of it all after a second task
        two_tasks = [row for row in rows if turns[0] in row["metrics"]]
        lines += [*table(two_tasks, turns), ""]
    return [*lines, cost + "."]


# --- The paper's claims beside what was measured -------------------------------------------------


def claims_table(results):
    """Lines of Markdown: every experiment's claims, with its verdicts."""
    yield "| claim | the paper | here | verdict | seeds |"
    yield "|---|---|---|---|---:|"
    for name in CLAIMING:
        module = importlib.import_module(f"experiments.{name}")
        if name not in results:
            yield f"| [{name}](#{name}) | | {MISSING} | | |"
            continue
        if not hasattr(module, "claims"):
            continue
        rows, seeds = results[name]["rows"], len(results[name].get("seeds", []))
        best = chosen(rows, *module.SWEEP) if hasattr(module, "SWEEP") else {}
        metrics = {row["arm"]: row.get("metrics", row) for row in rows}
        at = lambda arm, metric: np.array(metrics[best.get(arm, arm)][metric])
        for claim, paper, here, verdict in module.claims(at):
            yield f"| {claim} | {paper} | {here} | {verdict} | {seeds or ''} |"


if __name__ == "__main__":
    main()
