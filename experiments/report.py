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

from experiments.all import NAMES as ON_THE_TOY
from experiments.pass_at_k import KS
from experiments.runner import mean_and_spread, table
from experiments.scaling import WIDTHS
from experiments.settings import chosen

HERE = Path(__file__).parent
RESULTS, FIGURES, README = HERE / "results", HERE / "figures", HERE / "README.md"
NAMES = [*ON_THE_TOY, "real_model"]
MISSING = "not measured yet"
ARMS = {"base": "base", "SFT": "sft", "SDFT": "sdft"}  # as the claims name them
SWEEPS = {  # the metrics that settings are chosen by
    "pareto": ("val new", "val prior"),
    "knowledge": ("val strict", "val known"),
    "reasoning": ("val new", "val prior"),
}


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
    rows = results[name]["rows"]
    if name in SWEEPS:
        best = chosen(rows, *SWEEPS[name]).values()
        rows = [row for row in rows if " at " not in row["arm"] or row["arm"] in best]
    return table(rows, importlib.import_module(f"experiments.{name}").COLUMNS)


# --- The paper's claims beside what was measured -------------------------------------------------


def claims_table(results):
    """Lines of Markdown: every claim of the paper, and on how many seeds it holds here."""
    yield "| claim | the paper | here | verdict |"
    yield "|---|---|---|---|"
    missing = []

    def at(name, arm, metric):
        if name not in results:
            missing.append(name)
            return np.full(1, np.nan)
        return np.array(metrics_of(results[name]["rows"], name, arm)[metric])

    for claim, paper, here, holds in claims(at):
        cells = (claim, paper, MISSING, "") if missing else (claim, paper, here, verdict(holds))
        missing.clear()
        yield "| " + " | ".join(cells) + " |"


def metrics_of(rows, name, arm):
    """The metrics of an arm; in a sweep "sdft" is the chosen one of the family."""
    if name in SWEEPS:
        arm = chosen(rows, *SWEEPS[name]).get(arm, arm)
    return next(row["metrics"] for row in rows if row["arm"] == arm)


def verdict(holds):
    """Whether a claim holds; one boolean per seed that can tell."""
    if len(holds) == 0:
        return "cannot be tested here"
    word = "yes" if all(holds) else "partly" if any(holds) else "no"
    return f"{word}, on {sum(holds)} of {len(holds)} seeds"


def above(a, b):
    """By more than four answers of 400: two methods that both know everything differ by less."""
    return a > b + 0.01


def above_by_two_questions(a, b):
    """For facts, where there are only 20 questions: one of them decides nothing."""
    return a > b + 0.051


def claims(at):
    """(claim, the paper's numbers, ours, on which seeds it holds), one by one.

    at(experiment, arm, metric) are the values of all seeds.
    """
    for about in (
        claims_on_the_teacher,
        claims_on_forgetting,
        claims_on_stages,
        claims_on_facts,
        claims_on_reasoning,
        claims_on_size_and_samples,
        claims_on_ingredients,
    ):
        yield from about(at)


def against(a, b):
    return f"{mean_and_spread(a)} against {mean_and_spread(b)}"


def claims_on_the_teacher(at):
    base, teacher = (at("teacher", arm, "accuracy") for arm in ("base", "teacher"))
    yield (
        "the teacher is good",
        "base 42%, teacher 100%",
        f"base {mean_and_spread(base)}, teacher {mean_and_spread(teacher)}",
        teacher > 0.9,
    )
    arms = {"SFT": "sft", "teacher": "teacher", "SDFT": "sdft"}
    kl = {name: at("teacher", arm, "KL") for name, arm in arms.items()}
    yield (
        "the teacher is close to the base (KL, nats)",
        "SFT 1.26, teacher 0.68",
        ", ".join(f"{name} {mean_and_spread(values)}" for name, values in kl.items()),
        kl["teacher"] < kl["SFT"],
    )


def claims_on_forgetting(at):
    sdft, sft = ({m: at("pareto", arm, m) for m in ("new", "prior")} for arm in ("sdft", "sft"))
    yield (
        "SDFT forgets less than SFT (prior)",
        "64.5 against 53.4 (base 65.5)",
        against(sdft["prior"], sft["prior"]),
        above(sdft["prior"], sft["prior"]),
    )
    here, holds = [], []
    for rate in ("0.001", "0.0003"):
        matched = at("pareto", f"sft stopped, {rate}", "updates") < 400
        pair = sdft["prior"][matched], at("pareto", f"sft stopped, {rate}", "prior")[matched]
        holds += [*above(*pair)]
        values = f": {against(*pair)}" if any(matched) else ""
        here.append(f"SFT at {rate} matched on {sum(matched)} of {len(matched)} seeds{values}")
    yield (
        "also if SFT stops at SDFT's accuracy (asked by a replication; only seeds that matched)",
        "not reported",
        "; ".join(here),
        holds,
    )
    yield (
        "SDFT learns more than SFT (new)",
        "70.2 against 66.2; 70.6 against 63.2",
        against(sdft["new"], sft["new"]),
        above(sdft["new"], sft["new"]),
    )


def claims_on_stages(at):
    own = {k: [at("sequential", a, f"after {k}: {k}") for a in ("sft", "sdft")] for k in "XYZ"}
    end = {k: [at("sequential", a, k) for a in ("sft", "sdft")] for k in "XYZ"}
    base, best = at("sequential", "base", "X"), np.maximum(*own["X"])
    # Fig. 3's unit: 0 is the base, 1 the best of both methods. One answer is the smallest step.
    sft, sdft = ((after - base) / np.maximum(best - base, 1 / 400) for after in end["X"])
    yield (
        "SFT loses each skill when the next begins (X after Z; 0 = base, 1 = best; lost: X and Y "
        "below half of what they were after their own stage)",
        "about −.4",
        mean_and_spread(sft),
        np.all([end[k][0] < 0.5 * own[k][0] for k in "XY"], 0),
    )
    yield (
        "SDFT keeps all three skills (same unit; kept: each at least .85 of what it was after its "
        "own stage)",
        "about .85 to .95",
        mean_and_spread(sdft),
        np.all([(end[k][1] >= 0.85 * own[k][1]) & (own[k][1] > 0) for k in "XYZ"], 0),
    )


def claims_on_facts(at):
    scores = ("strict", "lenient", "OOD")
    sft, sdft = ({m: at("knowledge", arm, m) for m in scores} for arm in ("sft", "sdft"))
    shown = [" / ".join(mean_and_spread(of[m]) for m in scores) for of in (sft, sdft)]
    yield (
        "facts: SDFT answers other questions on them too (strict / lenient / OOD)",
        "SFT 80/95/80, SDFT 89/100/98, article in the prompt 91/100/100",
        "SFT {}; SDFT {}".format(*shown),
        above_by_two_questions(sdft["OOD"], sft["OOD"]),
    )
    yield (
        "SDFT learns more of the facts (strict)",
        "89 against 80",
        against(sdft["strict"], sft["strict"]),
        above_by_two_questions(sdft["strict"], sft["strict"]),
    )
    reads = [at("context", arm, "strict") for arm in ("answer only", "article only", "both")]
    yield (
        "the teacher needs article and answer (strict: answer / article / both)",
        "about 37 / about 75 / 89",
        " / ".join(map(mean_and_spread, reads)),
        above_by_two_questions(reads[1], reads[0]) & above_by_two_questions(reads[2], reads[1]),
    )


def claims_on_reasoning(at):
    new, length = (
        {name: at("reasoning", arm, metric) for name, arm in ARMS.items()}
        for metric in ("new", "length")
    )
    shown = (f"{k} {mean_and_spread(new[k])} / {mean_and_spread(length[k])}" for k in ARMS)
    yield (
        "answer-only demonstrations: SDFT learns and keeps reasoning (accuracy / tokens)",
        "base 31.2/4612, SFT 23.5/3273, SDFT 43.7/4180",
        "; ".join(shown),
        above(new["SDFT"], new["base"]) & (length["SDFT"] > 2.9),
    )
    yield (
        "SFT falls below the base there",
        "23.5 against 31.2",
        against(new["SFT"], new["base"]),
        above(new["base"], new["SFT"]),
    )


def claims_on_size_and_samples(at):
    gaps = np.array([at("scaling", f"width {n}", "gap") for n in WIDTHS])  # (widths, seeds)
    yield (
        "SDFT gains on SFT with size (SDFT minus SFT)",
        "3B −3.3, 7B +4.0, 14B +6.9 points",
        ", ".join(f"{n} wide {mean_and_spread(gap)}" for n, gap in zip(WIDTHS, gaps)),
        above(gaps[1:], gaps[:-1]).all(0),
    )
    curve = {
        name: np.array([at("pass_at_k", arm, f"pass@{k}") for k in KS])  # (k, seeds)
        for name, arm in ARMS.items()
    }
    ends = (f"{k} {mean_and_spread(c[0])} … {mean_and_spread(c[-1])}" for k, c in curve.items())
    ordered = above(curve["SDFT"], curve["SFT"]) & above(curve["SFT"], curve["base"])
    yield (
        f"pass@k: SDFT above SFT above the base for every k (k = 1 … {KS[-1]})",
        "for k up to 128",
        "; ".join(ends),
        ordered.all(0),
    )


def claims_on_ingredients(at):
    arms = ("sdft", "offline, reverse KL", "sft, offline")
    new = [at("on_policy", arm, "new") for arm in arms]
    yield (
        "on-policy learns more, reverse KL (new: SDFT / same loss offline / SFT offline)",
        "in this order (Fig. 6)",
        " / ".join(map(mean_and_spread, new)),
        above(new[0], new[1]),
    )
    prior = [at("on_policy", arm, "prior") for arm in ("sdft, forward KL", "offline, forward KL")]
    yield (
        "on-policy forgets less, forward KL (prior: SDFT against the same loss offline)",
        "not reported",
        against(*prior),
        above(*prior),
    )

    def ema_and_frozen(metric, rate=""):
        return [at("teacher_weights", rate + arm, metric) for arm in ("α .02", "frozen")]

    new = ema_and_frozen("new")
    yield (
        "an EMA teacher (α .02) does better than a frozen one",
        "about 70 against 65",
        f"{against(*new)}; at the highest rate {against(*ema_and_frozen('new', 'fast, '))}",
        above(*new),
    )
    live, fast = (at("teacher_weights", arm, "collapsed") for arm in ("live", "fast, live"))
    yield (
        "a live teacher diverges (collapsed seeds; at SDFT's rate)",
        "it does",
        f"{live.sum():.0f} of {len(live)}; at the highest rate {fast.sum():.0f} of {len(fast)}",
        live > 0,
    )
    noise = [at("kl", arm, "noise") for arm in ("reverse", "reverse, sampled token")]
    yield (
        "the sum over the vocabulary is less noisy than the sampled token (gradient noise)",
        "analytic best (App. A.1)",
        against(*noise),
        noise[0] < noise[1],
    )


if __name__ == "__main__":
    main()
