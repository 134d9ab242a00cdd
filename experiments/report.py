"""Writes the tables of the README from the results in experiments/results, so that text and numbers cannot drift apart.

    python -m experiments.report                  # rewrite the README's marked parts
    python -m experiments.report out/experiments  # take the results and figures of a finished run over first
"""

import argparse
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from experiments.all import NAMES as ON_THE_TOY
from experiments.pass_at_k import KS
from experiments.runner import mean_and_spread, table
from experiments.settings import chosen

HERE = Path(__file__).parent
RESULTS, ASSETS, README = HERE / "results", HERE.parent / "assets", HERE.parent / "README.md"
NAMES = [*ON_THE_TOY, "real_model"]
MISSING = "not measured yet"
SWEEPS = {"pareto": ("val new", "val prior"), "knowledge": ("val strict", "val known"), "reasoning": ("val new", "val prior")}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, nargs="?", help="--out_dir of a finished `python -m experiments.all`")
    run = p.parse_args(argv).run
    if run:
        finished = [name for name in NAMES if (run / f"{name}.json").exists()]
        if not finished:
            sys.exit(f"error: there are no results in {run}; make them with: python -m experiments.all --out_dir {run}")
        for name in finished:
            shutil.copy(run / f"{name}.json", RESULTS)
            if (run / f"{name}.png").exists():
                shutil.copy(run / f"{name}.png", ASSETS)
    text = rewritten(README.read_text(encoding="utf-8"), load(RESULTS))
    README.write_text(text, encoding="utf-8")


def load(folder):
    """The results in a folder: {experiment: content of its JSON file}."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def rewritten(text, results):
    """The README with fresh tables in its marked parts: <!-- NAME --> ... <!-- end -->."""
    parts = {"claims": claims_table(results)} | {name: experiment_table(results, name) for name in NAMES}
    for name, lines in parts.items():
        body = "\n".join(lines)
        text, n = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)
        if n != 1:
            sys.exit(f"error: README.md has {n} parts <!-- {name} --> ... <!-- end -->; there must be one")
    return text


def experiment_table(results, name):
    """The experiment's table; of a sweep only what was chosen, and what was not swept."""
    if name not in results:
        return [MISSING]
    rows = results[name]["rows"]
    if name in SWEEPS:
        best = chosen(rows, *SWEEPS[name]).values()
        rows = [r for r in rows if " at " not in r["arm"] or r["arm"] in best]
    return table(rows, importlib.import_module(f"experiments.{name}").COLUMNS)


# --- The paper's claims beside what was measured --------------------------------------------------------------------


def claims_table(results):
    yield "| the paper's claim | its numbers | here | holds? | why |"
    yield "|---|---|---|---|---|"
    missing = []

    def at(name, arm, metric):
        if name not in results:
            missing.append(name)
            return np.full(1, np.nan)
        return np.array(metrics(results, name, arm)[metric])

    for claim, paper, ours, holds, why in claims(at):
        if missing:
            yield f"| {claim} | {paper} | {MISSING} | | |"
            missing.clear()
            continue
        verdict = "yes" if holds.all() else "partly" if holds.any() else "no"
        yield f"| {claim} | {paper} | {ours} | {verdict}, on {holds.sum()} of {len(holds)} seeds | {why} |"


def metrics(results, name, arm):
    """The metrics of an arm; in a sweep "sdft" is the chosen one of the family."""
    rows = results[name]["rows"]
    arms = {r["arm"]: r["metrics"] for r in rows} | {
        family: next(r["metrics"] for r in rows if r["arm"] == best)
        for family, best in (chosen(rows, *SWEEPS[name]) if name in SWEEPS else {}).items()
    }
    return arms[arm]


def claims(at):
    """Claim, the paper's numbers, ours, on which seeds it holds, why. at(experiment, arm, metric) are the values of all seeds."""
    above = lambda a, b: a > b + 0.01  # four answers of 400; two methods that both know everything differ by less
    say = lambda *where: mean_and_spread(at(*where).tolist())
    new, prior = (lambda arm, m=m: at("pareto", arm, m) for m in ("new", "prior"))
    strict = lambda arm: at("context", arm, "strict")
    pass_at = lambda arm: np.array([at("pass_at_k", arm, f"pass@{k}") for k in KS])
    yield (
        "the teacher is good",
        "base 42%, teacher 100%",
        f"base {say('teacher', 'base', 'accuracy')}, teacher {say('teacher', 'teacher', 'accuracy')}",
        at("teacher", "teacher", "accuracy") > 0.9,
        "the base is built for it",
    )
    yield (
        "and close to the base",
        "KL to base: SFT 1.26, teacher 0.68 nats",
        f"SFT {say('teacher', 'sft', 'KL')}, teacher {say('teacher', 'teacher', 'KL')}, SDFT {say('teacher', 'sdft', 'KL')}",
        at("teacher", "teacher", "KL") < at("teacher", "sft", "KL"),
        "the teacher keeps the base's style, SFT's demonstrations do not",
    )
    yield (
        "SDFT forgets less than SFT",
        "old benchmarks 64.5 against 53.4 (base 65.5)",
        f"prior {say('pareto', 'sdft', 'prior')} against {say('pareto', 'sft', 'prior')}",
        above(prior("sdft"), prior("sft")),
        "its targets are the model's own responses",
    )
    yield (
        "also at matched accuracy on the new skill (a replication's doubt)",
        "",
        f"SFT at new {say('pareto', 'sft stopped, 0.001', 'new')}: prior {say('pareto', 'sft stopped, 0.001', 'prior')}; "
        f"at new {say('pareto', 'sft stopped, 0.0003', 'new')}: {say('pareto', 'sft stopped, 0.0003', 'prior')}",
        above(prior("sdft"), prior("sft stopped, 0.001")) & above(prior("sdft"), prior("sft stopped, 0.0003")),
        "learning a foreign style costs SFT prior skills all the way; it reaches SDFT's accuracy late or not at all",
    )
    yield (
        "SDFT learns more than SFT",
        "70.2 against 66.2; 70.6 against 63.2",
        f"new {say('pareto', 'sdft', 'new')} against {say('pareto', 'sft', 'new')}",
        above(new("sdft"), new("sft")),
        "both learn nearly all of it",
    )
    yield (
        "three skills in turn are kept",
        "about .85 to .95 of their best; SFT loses each",
        f"X after Z: {say('sequential', 'sdft', 'X')} against {say('sequential', 'sft', 'X')}",
        above(at("sequential", "sdft", "X"), at("sequential", "sft", "X")),
        "as above",
    )
    yield (
        "facts: SDFT answers other questions on them too (strict / lenient / OOD)",
        "SFT 80/95/80, SDFT 89/100/98, with the article 91/100/100",
        "; ".join(
            f"{arm} " + " / ".join(say("knowledge", arm.lower(), m) for m in ("strict", "lenient", "OOD")) for arm in ("SFT", "SDFT")
        ),
        above(at("knowledge", "sdft", "OOD"), at("knowledge", "sft", "OOD")),
        "but seldom: see below",
    )
    yield (
        "and learns more of the facts (strict)",
        "89 against 80",
        f"{say('knowledge', 'sdft', 'strict')} against {say('knowledge', 'sft', 'strict')}",
        above(at("knowledge", "sdft", "strict"), at("knowledge", "sft", "strict")),
        "the base hardly ever says a new fact by itself, and SDFT can only correct what the student says",
    )
    yield (
        "the teacher needs article and answer (strict)",
        "answer about 37, article about 75, both 89",
        " / ".join(say("context", arm, "strict") for arm in ("answer only", "article only", "both")),
        above(strict("article only"), strict("answer only")) & above(strict("both"), strict("article only")),
        "as in the paper: the answer alone does not hold the facts, and the base errs now and then where it has to add up itself",
    )
    yield (
        "answer-only demonstrations: SDFT keeps the reasoning (accuracy / tokens)",
        "base 31.2/4612, SFT 23.5/3273, SDFT 43.7/4180",
        "; ".join(
            f"{arm} {say('reasoning', arm.lower(), 'new')} / {say('reasoning', arm.lower(), 'length')}" for arm in ("base", "SFT", "SDFT")
        ),
        above(at("reasoning", "sdft", "new"), at("reasoning", "base", "new")) & (at("reasoning", "sdft", "length") > 2.9),
        "the teacher reads the result and still writes the step before it",
    )
    yield (
        "and SFT falls below the base there",
        "23.5 against 31.2",
        f"{say('reasoning', 'sft', 'new')} against {say('reasoning', 'base', 'new')}",
        above(at("reasoning", "base", "new"), at("reasoning", "sft", "new")),
        "this is the SFT that hardly trains, the best of its grid; the others stop to reason (length 2) and end lower",
    )
    widths = [16, 32, 64, 128]
    gaps = np.array([at("scaling", f"width {n}", "gap") for n in widths])
    yield (
        "SDFT gains on SFT with size (SDFT minus SFT)",
        "3B −3.3, 7B +4.0, 14B +6.9 points",
        ", ".join(f"{n} wide: {say('scaling', f'width {n}', 'gap')}" for n in widths),
        above(gaps[1:], gaps[:-1]).all(0),
        "every size here reads demonstrations; at 32 SFT learns half of the skill and SDFT, at the rate chosen for 128, nothing; from 64 on both learn it",
    )
    yield (
        "pass@k: SDFT above SFT above the base for every k",
        "for k up to 128",
        "; ".join(f"{arm} {say('pass_at_k', arm.lower(), 'pass@1')} … {say('pass_at_k', arm.lower(), 'pass@64')}" for arm in ("base", "SFT", "SDFT")),
        above(pass_at("sdft"), pass_at("sft")).all(0) & above(pass_at("sft"), pass_at("base")).all(0),
        "both are above the base up to k = 8 and neither above the other; the base has the right answer among 16 tries, so here it is sharpening",
    )
    yield (
        "on-policy matters",
        "SDFT about 70, the same loss on the teacher's responses 63, SFT on those 61",
        f"{say('on_policy', 'sdft', 'new')}, {say('on_policy', 'offline, reverse KL', 'new')}, "
        f"{say('on_policy', 'sft, offline', 'new')}",
        above(at("on_policy", "sdft", "new"), at("on_policy", "offline, reverse KL", "new")),
        "the teacher's responses are in the model's own style, and so close to its own",
    )
    yield (
        "an EMA teacher does better than a frozen one",
        "about 70 against 65",
        f"α .02 {say('teacher_weights', 'α .02', 'new')}, frozen {say('teacher_weights', 'frozen', 'new')}; "
        f"at the highest rate {say('teacher_weights', 'fast, α .02', 'new')}, {say('teacher_weights', 'fast, frozen', 'new')}",
        above(at("teacher_weights", "α .02", "new"), at("teacher_weights", "frozen", "new")),
        "the start is already a good teacher; at too high a rate an EMA teacher follows the student into collapse, a frozen one holds it",
    )
    yield (
        "a live teacher diverges",
        "it does",
        f"collapsed: {say('teacher_weights', 'live', 'collapsed')}; at the highest rate live {say('teacher_weights', 'fast, live', 'collapsed')}, "
        f"frozen {say('teacher_weights', 'fast, frozen', 'collapsed')}",
        at("teacher_weights", "live", "collapsed") > 0,
        "not at SDFT's rate; at the highest it does on every seed, and an EMA teacher with α = .2 too, while the frozen one holds",
    )
    yield (
        "the sum over the vocabulary is less noisy than the sampled token",
        "analytic best",
        f"gradient noise {say('kl', 'reverse', 'noise')} against {say('kl', 'reverse, sampled token', 'noise')}",
        at("kl", "reverse", "noise") < at("kl", "reverse, sampled token", "noise"),
        "",
    )


if __name__ == "__main__":
    main()
