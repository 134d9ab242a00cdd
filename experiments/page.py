"""Look at a run: one page with every token under both roles, curves, answers and settings.

    python -m experiments.page out/toy                       # writes out/toy/page.html
    python -m experiments.page out/a out/b --out both.html   # several runs, overlaid

A RUN is the --out_dir of a training. The page is one file; it needs no server and no network. It
shows what it finds, and says what is missing, of samples.jsonl and metrics.jsonl (data/README.md),
and of results.json: "config"; the "command" that made the run; and under any other name scores
{name: number}, or a list of them, each with what it is "after".
"""

import argparse
import html
import json
import math
from pathlib import Path

from data import files, watch

TEMPLATE = Path(__file__).with_suffix(".html")
FILES = ("results.json", "metrics.jsonl", "samples.jsonl")
PANELS = (  # title, metrics, top of the scale if it is a share, what it says
    ("Loss", ["loss"], None, "Nats per token. Arms train on different losses."),
    ("New task", ["new"], 1, "Share of correct answers on what is being learned."),
    ("Prior abilities", ["prior"], 1, "Never trained on. A large point: here forgetting began."),
    ("Teacher's accuracy", ["teacher_accuracy"], 1, "The student learns no more than that."),
    ("KL to the base", ["kl_student_base", "kl_teacher_base"], None, "In nats per token."),
    ("Entropy", ["student_entropy", "teacher_entropy"], None, "Of the next token, in nats."),
    ("Length", ["response_length"], None, "Tokens per response. A jump tells of a collapse."),
    ("Never ended", ["never_ended"], 1, "Share of responses that were cut off."),
    ("Correct rollouts", ["rollouts_correct"], 1, "Near 0: a cold start, nothing to build on."),
)  # fmt: skip


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="--out_dir of a training")
    p.add_argument("--out", type=Path, help="file to write (default: page.html in the first RUN)")
    args = p.parse_args(argv)
    out = args.out or args.runs[0] / "page.html"
    with files.errors_in_a_sentence("interrupted; nothing is half written"):
        page = render(*read_runs(args.runs))
        files.write_whole(out, lambda tmp: tmp.write_text(page, "utf-8", errors="replace"))
        print(f"open {out} in a browser ({len(page) / 1e3:.0f} kB)")


def read_runs(folders):
    """{run: its results.json}, the rows of metrics and of samples, notes on what is missing.

    Every row gets the names of its "arm" and, if there are several, of its "run".
    """
    results, rows, notes = {}, {"metrics.jsonl": [], "samples.jsonl": []}, []
    for folder in folders:
        if not any((folder / name).is_file() for name in FILES):
            names = ", ".join(FILES)
            raise ValueError(f"{folder} holds no run (none of {names}); name a run's --out_dir")
        results[str(folder)], run = {}, f", {folder}" if len(folders) > 1 else ""
        for path in (folder / name for name in FILES):
            if not path.is_file():
                notes.append(f"{folder} has no {path.name} yet.")
            elif path.name == "results.json":
                results[str(folder)] = json.loads(path.read_text(encoding="utf-8"))
            else:
                found, n_damaged = files.read(path)
                if n_damaged:
                    notes.append(f"{path} has damaged lines, which are left out: {n_damaged}.")
                for row in found:
                    arm = {"sft": "SFT", "sdft": "SDFT"}.get(row["phase"], row["phase"])
                    rows[path.name].append(row | {"arm": arm + run, "run": run})
    return results, *rows.values(), notes


def when(row):
    return (f"{row['skill']}, " if row.get("skill") else "") + f"step {row['step']}"


def is_number(x):
    return isinstance(x, (int, float)) and math.isfinite(x)


def thinned(items, n):
    """At most n of the items, evenly spaced from the first to the last."""
    if len(items) <= n:
        return items
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


# --- The page -------------------------------------------------------------------------------------


class Markup(str):
    """Text that is HTML already."""


def el(tag, *children, **attributes):
    """An element of HTML or SVG. All that is not Markup is escaped: a run's text is never HTML."""
    pairs = [(name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items()]
    words = "".join(f' {name}="{html.escape(str(value))}"' for name, value in pairs)
    inner = [c if isinstance(c, Markup) else html.escape(str(c)) for c in children]
    return Markup(f"<{tag}{words}>{''.join(inner)}</{tag}>")


def table(head, rows):
    lines = [el("tr", *[el("th", cell) for cell in head])]
    lines += [el("tr", *[el("td", cell) for cell in row]) for row in rows]
    return el("div", el("table", *lines), class_="scroll")


def render(results, metrics, samples, notes):
    """The page of all runs."""
    prompts = by_prompt(samples)
    tracks = [{arm: thinned(rows, 12) for arm, rows in arms.items()} for arms, _ in prompts]
    warned = [(row, sentence) for row in metrics for sentence in row.get("warnings") or []]
    warned = [el("li", f"{row['arm']}, {when(row)}: {sentence}") for row, sentence in warned]
    # No part has a "<" of a run's text, so that none ends its element or holds another's mark.
    parts = {
        "title": html.escape(", ".join(results)),
        "warnings": el("ul", *warned, class_="warn"),
        "notes": el("ul", *[el("li", note) for note in notes]),
        "curves": curves(by_arm(metrics)),
        "sides": side_by_side([sides for _, sides in prompts]),
        "settings": "".join(map(scores, results, results.values())) + settings(results),
        "data": json.dumps(tracks).replace("<", "\\u003c"),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)
    return page


def by_prompt(samples):
    """[({arm: rows}, {"base", arm or "teacher": the row side by side})], one of each prompt."""
    prompts, first_skill = {}, {}
    for row in samples:
        arm, run, skill = row["arm"], row["run"], row.get("skill")
        key = row["kind"], row["prompt"], row["expected"]
        arms, sides = prompts.setdefault(key, ({}, {}))
        if row["role"] == "teacher":
            sides.setdefault("teacher" + run, row)
            continue
        # The model before training is an arm's student at step 0 of what it learns first.
        if row["step"] == 0 and first_skill.setdefault(arm, skill) == skill:
            sides.setdefault("base" + run, row)
        arms.setdefault(arm, []).append(row)
        sides[arm] = row
    return [*prompts.values()]


def side_by_side(prompts):
    """What the base, the arms after training and the teacher answer to every prompt."""
    columns = dict.fromkeys(column for sides in prompts for column in sides)
    columns = sorted(columns, key=lambda column: column.startswith("teacher"))
    lines = []
    for sides in prompts:
        about = next(iter(sides.values()))
        cells = [answer(sides[column]) if column in sides else "–" for column in columns]
        lines.append([f"{about['prompt']} ({about['kind']})", about["expected"], *cells])
    return table(["prompt", "expected", *columns], lines)


def answer(row):
    verdict = {True: "✓ correct, ", False: "✗ wrong, "}.get(row["correct"], "")
    return Markup(el("div", row["response"] or "∅") + el("small", verdict + when(row)))


def scores(run, results):
    """All scores of results.json, and the command."""
    rows = []
    for name, found in results.items():
        for row in found if isinstance(found, list) else [found]:
            if name != "config" and isinstance(row, dict):
                label = name if row is found else f"{name}, after {row['after']}"
                rows.append((label, {k: f"{v:.4g}" for k, v in row.items() if is_number(v)}))
    columns = dict.fromkeys(name for _, numbers in rows for name in numbers)
    cells = [[label, *(numbers.get(name, "–") for name in columns)] for label, numbers in rows]
    command = results.get("command", "The run has not recorded its command.")
    head = el("h3", run) + el("div", command, class_="text")
    return head + table(["scores", *columns], cells)


def settings(results):
    """A column per run; first the settings that differ."""
    configs = [found.get("config", {}) for found in results.values()]
    names = dict.fromkeys(name for config in configs for name in config)
    rows = [[name, *(str(config.get(name, "–")) for config in configs)] for name in names]
    return table(["setting", *results], sorted(rows, key=lambda row: len({*row[1:]}) == 1))


# --- Curves ---------------------------------------------------------------------------------------


def by_arm(metrics):
    """{arm: its rows}; the "updates" of a row count those for its earlier skills too."""
    arms, start = {}, {}
    for row in metrics:
        if row["phase"] != "pretrain":
            rows = arms.setdefault(row["arm"], [])
            before = rows[-1]["updates"] if rows else 0
            before = start.setdefault((row["arm"], row.get("skill")), before)
            rows.append(row | {"updates": before + row["step"]})
    return arms


def curves(arms):
    """A legend that tells where forgetting began, and the panels."""
    legend = []
    for i, (arm, rows) in enumerate(arms.items()):
        fall = forgetting(rows)
        began = f": forgetting began at {when(fall)} (prior {fall['prior']:.2f})" if fall else ""
        legend.append(el("li", arm + began, class_=f"c{i % 8}"))
    charts = [chart(arms, *panel) for panel in PANELS]
    return el("ul", *legend, class_="legend") + el("div", *charts, class_="two")


def forgetting(rows):
    """The first row whose prior accuracy is far below the first one's, or None."""
    rows = [row for row in rows if is_number(row.get("prior"))]
    return next((row for row in rows if row["prior"] < rows[0]["prior"] - watch.FORGETTING), None)


def chart(arms, title, metrics, top, caption):
    """A figure of the metrics of all arms; no text if none was measured."""
    rows = [row for rows in arms.values() for row in rows]
    values = [row[name] for name in metrics for row in rows if is_number(row.get(name))]
    if not values:
        return ""
    top, svg = top or max(values) or 1, []
    for y, value in ((160, 0), (90, top / 2), (20, top)):
        svg.append(el("line", x1=40, x2=330, y1=y, y2=y))
        svg.append(el("text", f"{value:.3g}", x=36, y=y + 4, text_anchor="end"))
    first = next(iter(arms.values()))
    for row in first:
        if row["step"] == 0 and row.get("skill"):
            x = round(40 + 290 * row["updates"] / (first[-1]["updates"] or 1))
            svg.append(el("line", x1=x, x2=x, y1=20, y2=160))
            svg.append(el("text", f"learns {row['skill']}", x=x + 4, y=14))
    totals = dict.fromkeys(f"{rows[-1]['updates']:,}" for rows in arms.values())
    svg.append(el("text", " / ".join(totals) + " updates", x=330, y=178, text_anchor="end"))
    for i, rows in enumerate(arms.values()):
        svg += [el("g", *curve(rows, metric, top), class_=f"c{i % 8}") for metric in metrics]
    figure = el("svg", *svg, viewBox="0 0 340 184", role="img", aria_label=title)
    return el("figure", el("h3", title), figure, el("figcaption", caption))


def curve(rows, metric, top):
    """The line of an arm, and its points, each with a tip."""
    width = 290 / (rows[-1]["updates"] or 1)
    fall = forgetting(rows) if metric == "prior" else None
    found = thinned([row for row in rows if is_number(row.get(metric))], 100)
    places = [(40 + width * row["updates"], 160 - 140 * row[metric] / top) for row in found]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    yield el("polyline", points=path, stroke_dasharray="5 3" if "teacher" in metric else "none")
    for row, (x, y) in zip(found, places):
        tip = el("title", f"{row['arm']}, {metric}, {when(row)}: {row[metric]:.4g}")
        yield el("circle", tip, cx=f"{x:.1f}", cy=f"{y:.1f}", r=8 if row is fall else 2.5)


if __name__ == "__main__":
    main()
