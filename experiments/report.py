"""Verdicts, tables and figures of the results, and the parts of README.md that are made from them.

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
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from data.files import write_whole
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
        yield f"Of {sum(yes for _, yes in tests)} yes, {stand} stand at a false discovery rate of"
        yield f".05 over all {len(tests)} tests (Benjamini-Hochberg), {familywise} if the chance of"
        yield "a single wrong one is to be .05 (Holm)."


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
        return (found if isinstance(found, str) else mean_and_spread(found)) + end

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


# --- Tables --------------------------------------------------------------------------------------


def label(row):
    """The arm, with its rate, and a mark if that is at the end of those that were tried."""
    rate = f" at {row['rate']:g}" if "rate" in row else ""
    return row["arm"] + rate + "*" * row.get("end", False)


def table(rows, columns):
    """Lines of Markdown: mean ± standard deviation over the seeds."""
    yield "| arm | " + " | ".join(columns) + " |"
    yield "|---" + "|---:" * len(columns) + "|"
    for row in rows:
        cells = [mean_and_spread(row["metrics"].get(c, ())) for c in columns]
        yield f"| {label(row)} | " + " | ".join(cells) + " |"


def mean_and_spread(values):
    """The text "0.94 ± 0.04"; one seed has no spread. Large numbers get fewer digits."""
    values = np.atleast_1d(values)
    if len(values) == 0:
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


# --- Figures -------------------------------------------------------------------------------------


def panels_of_lines(plt, panels, ticks, xlabel=None, ylabel="greedy accuracy"):
    """A figure with a panel for every title, and in it a line for every name.

    panels is {title: {name: values (n, seeds)}}; the values stand at the first n of the ticks.
    """
    drawn, axes = plt.subplots(
        1, len(panels), figsize=(1.5 + 4 * len(panels), 3.4), sharey=True, squeeze=False
    )
    for panel, (title, lines) in zip(axes[0], panels.items()):
        for name, values in lines.items():
            (mean, sd), fmt = mean_and_sd(values), "k--o" if name in ("base", "prior") else "-o"
            panel.errorbar(range(len(mean)), mean, sd, fmt=fmt, label=name, capsize=3, markersize=4)
        panel.set(title=title, xlabel=xlabel, ylim=(-0.03, 1.05))
        panel.set_xticks(range(len(ticks)), ticks)
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylabel(ylabel)
    legend_beside(axes[0, -1])
    return drawn


def new_and_prior(rows, plt, field, xlabel):
    """Two panels, a line for every family over the values of a field of the arms."""
    families = dict.fromkeys(row["family"] for row in rows)
    panels = {
        title: {f: [row["metrics"][metric] for row in rows if row["family"] == f] for f in families}
        for metric, title in (("new", "new skill"), ("prior", "prior skills"))
    }
    ticks = [f"{value:g}" for value in dict.fromkeys(row[field] for row in rows)]
    return panels_of_lines(plt, panels, ticks, xlabel)


def legend_beside(panel):
    """Outside the axes, where it hides nothing."""
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
    write_whole(path, lambda tmp: drawn.savefig(tmp, **save))
    plt.close(drawn)
    print(f"wrote {path}")


# --- Results and README --------------------------------------------------------------------------


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("run", type=Path, nargs="?", help="--out_dir of a finished experiments.all")
    run = p.parse_args(argv).run
    try:
        if run:
            take_over(run)
        text = rewritten(README.read_text(encoding="utf-8"), load(RESULTS))
        write_whole(README, lambda tmp: tmp.write_text(text, encoding="utf-8"))
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")


def take_over(run):
    """Copy the results and figures of a finished run, and measure the forgetting law on them."""
    from experiments import forgetting_law  # it needs this module

    results = load(run)
    if not results:
        command = f"python -m experiments.all --out_dir {run}"
        raise ValueError(f"there are no results in {run}; make them with: {command}")
    check(results)
    for path in run.glob("*.png"):
        shutil.copy(path, FIGURES)
    if {*forgetting_law.SOURCES} <= {*results}:
        law = results["forgetting_law"] = forgetting_law.measure(results)
        draw(forgetting_law.figure, law["rows"], FIGURES / "forgetting_law.png")
    for name, result in results.items():
        write(RESULTS / f"{name}.json", result)


def load(folder):
    """The results in a folder: {experiment: content of its JSON file}."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def check(results):
    """Raises ValueError if a result has other arms than its experiment."""
    from experiments.all import REPORTED  # these modules need this one

    about = ("settings", "metrics", "seconds")
    fields = lambda rows: [{k: v for k, v in row.items() if k not in about} for row in rows]
    for e in REPORTED:
        if e.arms and e.name in results and fields(results[e.name]["rows"]) != fields(e.arms):
            raise ValueError(f"{e.name}.json has other arms than its code; run {e.name} again")


def write(path, result):
    """A JSON file with one row a line."""
    about = json.dumps({k: v for k, v in result.items() if k != "rows"})
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    text = f'{about[:-1]}, "rows": [\n{rows}\n]}}\n'
    write_whole(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def rewritten(text, results):
    """The README with fresh tables in its marked parts: <!-- NAME --> ... <!-- end -->."""
    from experiments.all import REPORTED  # these modules need this one

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
    lines = [*table(rows, experiment.columns), ""]
    if then := experiment.then_columns:
        lines += [*table([row for row in rows if then[0] in row["metrics"]], then), ""]
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
