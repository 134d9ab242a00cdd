"""The claims and their verdicts, and the parts of README.md that are made from the results.

    python -m experiments.report                  # rewrite the marked parts
    python -m experiments.report out/experiments  # take over a finished run's results first

A claim is about a difference, taken seed by seed: both methods start from the same base and see the
same inputs. Its mean over n seeds has a 95% confidence interval of ± t · s / √n (Student's t). What
counts as a difference depends on the unit, see MARGINS. The verdict is

    yes            the interval is above zero, and the mean above the margin
    the reverse    the interval is below zero, and the mean below minus the margin
    no difference  the interval lies within ± the margin
    undecided      anything else: more seeds would tell
    cannot         nothing could show: both methods are within the margin of all or nothing

Claims against a number have the margin 0. A rate at the end of those that were tried has a "*".
"""

import argparse
import csv
import itertools
import re
import shutil
from pathlib import Path

import numpy as np

from data.files import errors_in_a_sentence, write_whole
from experiments import forgetting_law, tables
from experiments.all import REPORTED
from experiments.settings import chosen

HERE = Path(__file__).parent
RESULTS, FIGURES, README = HERE / "results", HERE / "figures", HERE / "README.md"
CLAIMS = HERE / "claims.csv"
MISSING = "not measured yet"
CANNOT = "cannot be tested here"
MARGINS = {
    "accuracy": 0.02,  # two standard errors of one near .95, on 400 answers
    "facts": 0.05,  # one of 20
    "found": 0.05,  # two standard errors on 40 questions, asked ten times
    "gap": 0.02,  # of two accuracies
    "nats": 0.1,
    "noise": 0.1,  # in lengths of the exact gradient
    "number": 0.0,
}


# --- Claims and verdicts -------------------------------------------------------------------------


def claims_table(experiments, results):
    """Lines of Markdown: the claims of claims.csv, in its order, with what was measured."""
    yield "| claim | the paper | here | verdict | seeds |"
    yield "|---|---|---|---|---:|"
    with open(CLAIMS, encoding="utf-8", newline="") as f:
        claims, tests = [*csv.DictReader(f)], []
    for name, rows in itertools.groupby(claims, key=lambda claim: claim["experiment"]):
        if name not in results:
            yield f"| [{name}](#{name}) | | {MISSING} | | |"
            continue
        metrics, seeds = of_arms(experiments[name], results[name]), results[name]["seeds"]
        for claim in rows:
            here, differences, verdict = judge(claim, metrics)
            if np.ndim(differences) and not verdict.startswith(CANNOT):
                tests.append((p_value(differences), verdict.startswith("yes")))
            text = f"| {claim['claim']} | {claim['paper']} | {here} | {verdict} |"
            yield f"{text} {len(seeds) or ''} |"
    if tests:
        stand, familywise = surviving(tests)
        yield ""
        yield (
            f"Of {sum(yes for _, yes in tests)} tested yes, {stand} stand at a false discovery "
            f"rate of .05 over all {len(tests)} tests (Benjamini-Hochberg), {familywise} if the "
            "chance of a single wrong one is to be .05 (Holm)."
        )


def of_arms(experiment, result):
    """{arm: {metric: values}}, at the chosen rates, with what the experiment derives from them."""
    rows = chosen(result["rows"], experiment.choose_by)
    metrics = {row["arm"]: {**row["metrics"]} for row in rows}
    if experiment.derive:
        experiment.derive(metrics)
    for row in rows:
        metrics[row["arm"]]["at the end"] = row.get("end", False)
    return metrics


def judge(claim, metrics):
    """What the table shows of a claim, its differences, and the verdict. Columns of claims.csv:

    metric  what is compared, if a cell does not name its own
    more    is claimed to be more, "arm" or "arm: metric", by more than the margin, than
    than    the same, or a number
    unit    of MARGINS
    here    text with "{arm}", "{arm: metric}", "{more}" or "{than}" for mean and spread
    cannot  why it cannot be tested here
    """

    def values(cell):
        cell = claim.get(cell, cell)
        if re.fullmatch(r"[\d.]+", cell):
            return float(cell)
        arm, _, metric = cell.partition(": ")
        found = metrics[arm][metric or claim["metric"]]
        return found if isinstance(found, str) else np.array(found)

    def shown(match):
        arm = claim.get(match[1], match[1]).partition(": ")[0]
        found, end = values(match[1]), "*" * metrics.get(arm, {}).get("at the end", False)
        return (found if isinstance(found, str) else tables.mean_and_spread(found)) + end

    here = re.sub(r"\{(.+?)\}", shown, claim["here"] or "{more} against {than}")
    more, than, margin = values("more"), values("than"), MARGINS[claim["unit"]]
    differences = more - than
    if claim["cannot"]:
        return here, differences, f"{CANNOT}: {claim['cannot']}"
    if claim["unit"] in ("accuracy", "facts", "found") and np.ndim(than):
        low, high = sorted([np.mean(more), np.mean(than)])
        if low >= 1 - margin:
            return here, differences, f"{CANNOT}: both at the ceiling"
        if high <= margin:
            return here, differences, f"{CANNOT}: both at the floor"
    return here, differences, verdict(differences, margin)


def verdict(differences, margin):
    """The verdict on "more", for a difference per seed, or a single number without any seeds."""
    if np.ndim(differences) == 0:
        return "yes" if differences > margin else "no"
    if len(differences) < 2:
        return CANNOT + ": one seed" * len(differences)
    mean, half = interval(differences)
    text = f"({mean:+.2f} ± {half:.2f})"
    if mean - half > 0 and mean > margin:
        return f"yes {text}"
    if mean + half < 0 and mean < -margin:
        return f"the reverse {text}"
    if abs(mean) + half <= margin:
        return f"no difference {text}"
    return f"undecided {text}"


def interval(values):
    """Mean of at least two seeds' values, and half the width of its 95% confidence interval."""
    v = len(values) - 1
    x, tails = students_t(v)
    t = v**0.5 * np.tan(x[np.argmax(tails <= 0.05)])
    return np.mean(values), t * np.std(values, ddof=1) / len(values) ** 0.5


def p_value(values):
    """Of the two-sided test that the mean of the seeds' values is zero."""
    v = len(values) - 1
    x, tails = students_t(v)
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return tails[np.searchsorted(x, np.arctan2(abs(np.mean(values)), error * v**0.5))]


def students_t(v):
    """x and P(|T| > √v tan x) for v degrees of freedom: the density of x is that of cos^(v-1)."""
    x = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(x) ** (v - 1)
    return x, density[::-1].cumsum()[::-1] / density.sum()


def surviving(tests):
    """How many yes stand by Benjamini-Hochberg and by Holm, of tests (p, is it a yes)."""
    p, yes = np.array(sorted(tests)).T
    rank = np.arange(1, len(p) + 1)
    n_false_discovery = rank[p <= 0.05 * rank / len(p)].max(initial=0)
    n_familywise = np.cumprod(p <= 0.05 / rank[::-1]).sum()
    return int(yes[:n_false_discovery].sum()), int(yes[:n_familywise].sum())


# --- Results and README --------------------------------------------------------------------------


def main(argv=None):
    with errors_in_a_sentence("interrupted; nothing is half written"):
        raw = argparse.RawDescriptionHelpFormatter
        p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
        p.add_argument("run", type=Path, nargs="?", help="--out_dir of a finished experiments.all")
        run = p.parse_args(argv).run
        if run:
            take_over(run)
        text = rewritten(README.read_text(encoding="utf-8"), tables.load(RESULTS))
        write_whole(README, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def take_over(run):
    """Copy the results and figures of a finished run, and measure the forgetting law on them."""
    results = tables.load(run)
    if not results:
        command = f"python -m experiments.all --out_dir {run}"
        raise ValueError(f"there are no results in {run}; make them with: {command}")
    check(results)
    for path in run.glob("*.png"):
        shutil.copy(path, FIGURES)
    merged = tables.load(RESULTS) | results
    if {*forgetting_law.SOURCES} <= {*merged}:
        law = results["forgetting_law"] = forgetting_law.measure(merged)
        tables.draw(forgetting_law.figure, law["rows"], FIGURES / "forgetting_law.png")
    for name, result in results.items():
        tables.write(RESULTS / f"{name}.json", result)


def check(results):
    """Raises ValueError if a result has other arms than its experiment."""
    about = ("settings", "metrics", "seconds")
    fields = lambda rows: [{k: v for k, v in row.items() if k not in about} for row in rows]
    for e in REPORTED:
        if e.arms and e.name in results and fields(results[e.name]["rows"]) != fields(e.arms):
            raise ValueError(f"{e.name}.json has other arms than its code; run {e.name} again")


def rewritten(text, results):
    """The README with fresh tables in its marked parts: <!-- NAME --> ... <!-- end -->."""
    check(results)
    experiments = {e.name: e for e in REPORTED}
    for name in re.findall(r"<!-- (?!end)(\w+) -->\n", text):
        if name == "claims":
            lines = claims_table(experiments, results)
        elif name in experiments:
            lines = experiment_table(experiments[name], results.get(name))
        else:
            raise ValueError(f"README.md has a part {name}, and there is no such experiment")
        before, rest = text.split(f"<!-- {name} -->\n")
        lines = "\n".join(lines)
        text = f"{before}<!-- {name} -->\n{lines}\n{rest[rest.index('<!-- end -->') :]}"
    return text


def experiment_table(experiment, result):
    """The experiment's tables: of a sweep only what was chosen, and what was not swept."""
    if result is None:
        return [MISSING]
    rows = chosen(result["rows"], experiment.choose_by)
    lines = [*tables.table(rows, experiment.columns), ""]
    if then := experiment.then_columns:
        lines += [*tables.table([row for row in rows if then[0] in row["metrics"]], then), ""]
    seeds = len(result["seeds"])
    if not seeds:  # a measurement on others' results
        return lines
    cost = f"{seeds} seed{'s' * (seeds > 1)}" + ", one where there is no ±" * bool(experiment.once)
    if not experiment.arguments:  # with flags they run on more than one kind of machine
        on = f" ({result['machine']})" if "machine" in result else ""
        cost += f"; {result['seconds']:,} s in all, in processes of one thread{on}"
    return [*lines, cost + "."]


if __name__ == "__main__":
    main()
