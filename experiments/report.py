"""Writes the tables of the README from the results in experiments/results, so that text and numbers cannot drift apart.

    python -m experiments.report                  # rewrite the README's marked parts
    python -m experiments.report out/experiments  # take the results and figures of a run over first
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from experiments.all import NAMES
from experiments.common import chosen, table

HERE = Path(__file__).parent
RESULTS, ASSETS, README = HERE / "results", HERE.parent / "assets", HERE.parent / "README.md"
SWEEPS = {"pareto": ("val new", "val prior"), "knowledge": ("val strict", "val known"), "reasoning": ("val new", "val prior")}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, nargs="?", help="--out_dir of a finished `python -m experiments.all`")
    run = p.parse_args(argv).run
    if run:
        if missing := [name for name in NAMES if not (run / f"{name}.json").exists()]:
            sys.exit(f"error: {run} has no {missing[0]}.json; finish it with python -m experiments.all --out_dir {run}")
        for name in NAMES:
            shutil.copy(run / f"{name}.json", RESULTS)
            if (run / f"{name}.png").exists():
                shutil.copy(run / f"{name}.png", ASSETS)
    README.write_text(rewritten(README.read_text(), load(RESULTS)))


def load(folder):
    """The JSON files of a folder: {name: result}."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rewritten(text, results):
    """The README with a fresh table in every marked part: <!-- NAME --> ... <!-- end -->."""
    parts = {"claims": claims_table(results)} | {name: experiment_table(result) for name, result in results.items()}
    for name, lines in parts.items():
        body = "\n".join(lines)
        text, n = re.subn(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", lambda m: m[1] + body + m[2], text, flags=re.S)
        if n != 1:
            sys.exit(f"error: README.md has {n} parts marked <!-- {name} --> ... <!-- end -->; there must be one")
    return text


def experiment_table(result):
    """The columns of the experiment's table; of a sweep the chosen settings and what is not swept."""
    import importlib

    name, rows = result["experiment"], result["rows"]
    if name in SWEEPS:
        best = set(chosen(rows, *SWEEPS[name]).values())
        rows = [r for r in rows if "val " not in str([*r["metrics"]]) or ", " not in r["arm"] or r["arm"] in best]
    return [*table(rows, importlib.import_module(f"experiments.{name}").COLUMNS)]
