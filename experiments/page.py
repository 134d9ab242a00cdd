"""Look at a run: one page with every token under both roles, curves, answers and settings.

    python -m experiments.page out/toy                       # writes out/toy/page.html
    python -m experiments.page out/a out/b --out both.html   # several runs, overlaid
    chromium --headless --hide-scrollbars --window-size=1000,1150 --screenshot=page.png PAGE.html

A RUN is the --out_dir of a training. The page is one file; it needs no server and no network. It
shows what it finds, and says what is missing, of

    results.json   "config"; "command" that made the run; "base", "final" or an arm's name: scores
                   {name: number}, or a list of them, each with what it is "after"
    samples.jsonl  see data/samples.py
    metrics.jsonl  rows with phase, skill, step, loss, and the keys of data/watch.py
"""

import argparse
import html
import json
import sys
from pathlib import Path

from data import samples

TEMPLATE = Path(__file__).with_suffix(".html")
METRICS = (
    *("loss", "new", "prior", "teacher_accuracy", "never_ended", "rollouts_correct"),
    *("kl_student_base", "kl_teacher_base", "student_entropy", "teacher_entropy"),
    "response_length",
)
MISSING = {
    "results.json": "the run goes on or was interrupted, so that there are no settings yet",
    "metrics.jsonl": "there are no curves",
    "samples.jsonl": "there are no responses to look at",
}
FALL = 0.05  # loss of prior accuracy that counts as forgetting
MAX_POINTS = 120  # of a curve
MAX_WARNINGS = 20
MAX_BYTES = 600_000  # of all samples
LIMITS = ((12, 24), (12, 12), (12, 6), (12, 3), (6, 3), (3, 3), (1, 3))  # prompts, rows per arm


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="--out_dir of a training")
    p.add_argument("--out", type=Path, help="file to write (default: page.html in the first RUN)")
    args = p.parse_args(argv)
    out = args.out or args.runs[0] / "page.html"
    try:
        page = render(collect([read_run(folder) for folder in args.runs]))
        out.write_text(page, encoding="utf-8", errors="replace")
    except ValueError as e:
        sys.exit(f"error: {e}")
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}; choose another RUN or --out")
    print(f"open {out} in a browser ({len(page) / 1e3:.0f} kB)")


# --- What a run's folder holds --------------------------------------------------------------------


def read_run(folder):
    """What the folder has: name, config, results, metrics, samples, notes on what is missing."""
    there = [name for name in MISSING if (folder / name).is_file()]
    if not there:
        files = ", ".join(MISSING)
        raise ValueError(f"{folder} holds no run (none of {files}); name the --out_dir of a run")
    run = {"name": str(folder), "results": {}, "metrics": [], "samples": []}
    notes = [f"There is no {name}: {why}." for name, why in MISSING.items() if name not in there]
    if "results.json" in there:
        try:
            run["results"] = dict(json.loads((folder / "results.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError):
            notes.append("results.json cannot be read: there are no settings.")
    for name in [name for name in there if name != "results.json"]:
        rows, unreadable = samples.read(folder / name)
        if name == "samples.jsonl":
            compact = [compact_sample(row) for row in rows]
            rows = [row for row in compact if row]
            unreadable += len(compact) - len(rows)
        run[name.removesuffix(".jsonl")] = rows
        if unreadable:
            notes.append(f"Of {name}, {count(unreadable, 'line')} cut off or damaged: left out.")
    config = run["results"].get("config")
    config = {k: plain(v) for k, v in config.items()} if isinstance(config, dict) else {}
    return run | {"config": config, "notes": notes}


def compact_sample(row):
    """A row of samples.jsonl with lists for tokens, to keep the page small; None if damaged."""
    try:
        tokens = []
        for token in row["tokens"]:
            names = ("student", "teacher", "divergence", "reward", "push")
            numbers = [number(token[name]) for name in names]
            tops = (token["student_top"], token["teacher_top"])
            tops = [[[int(i), str(text), number(p)] for i, text, p in top] for top in tops]
            tokens.append([int(token["id"]), str(token["text"]), *numbers, *tops])
            if None in numbers + [p for top in tops for _, _, p in top]:
                return None
        texts = ("prompt", "teacher_prompt", "demonstration", "response", "divergence")
        row |= {name: str(row[name] or "") for name in texts}
        for name in ("skill", "expected"):
            row[name] = None if row.get(name) is None else str(row[name])
        row["phase"], row["step"] = str(row.get("phase") or "training"), number(row["step"])
        row["kind"] = "prior" if row.get("kind") == "prior" else "new"
        row["role"] = "teacher" if row.get("role") == "teacher" else "student"
        row["correct"] = row["correct"] if isinstance(row.get("correct"), bool) else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return None if row["step"] is None else row | {"tokens": tokens}


def number(x):
    """A finite number as it is, None for anything else."""
    return x if type(x) in (int, float) and abs(x) < 1e300 else None  # NaN is not below


def plain(value):
    return value if isinstance(value, str) else json.dumps(value)


def count(n, word):
    return f"{n:,} {word}" + ("" if n == 1 else "s")


# --- What the page shows --------------------------------------------------------------------------


def collect(runs):
    """The content of the page: runs, arms with their curves, prompts with their responses."""
    arms, rows, shown = [], [], []
    for run, label in zip(runs, run_labels(runs)):
        phases = curves(run)
        for row in run["samples"]:
            if row["role"] != "teacher" and row["phase"] != "base":
                phases.setdefault(row["phase"], {"stages": [], "points": {}})
        place = {phase: len(arms) + i for i, phase in enumerate(phases)}
        for phase, curve in phases.items():
            name = phase.upper() if phase in ("sft", "sdft") else phase
            arm = curve | {"label": name + label, "sft": phase.startswith("sft")}
            arm["forgetting"] = forgetting(arm)
            points = {name: thinned(points, MAX_POINTS) for name, points in curve["points"].items()}
            arms.append(arm | {"points": points})
        rows += [row | {"run": label, "arm": place.get(row["phase"])} for row in run["samples"]]
        command = run["results"].get("command")
        words = command if isinstance(command, list) else [command or ""]
        shown.append({key: run[key] for key in ("name", "config", "notes")})
        shown[-1] |= {"command": " ".join(map(str, words)), "warnings": warnings(run["metrics"])}
        shown[-1]["results"] = results_table(run["results"])
    prompts, note = choose(rows, [arm["label"] for arm in arms])
    return {"runs": shown, "arms": arms, "prompts": prompts, "note": note}


def run_labels(runs):
    """What tells each of several runs apart: the settings that differ, else the folder."""
    if len(runs) == 1:
        return [""]
    configs = [run["config"] for run in runs]
    names = [k for k in dict.fromkeys(k for c in configs for k in c) if k != "out_dir"]
    names = [k for k in names if len({c.get(k) for c in configs}) > 1][:4]
    labels = [", ".join(f"{k} {c[k]}" for k in names if k in c) for c in configs]
    clear = len(set(labels)) == len(labels) and all(labels)
    return [f", {label if clear else run['name']}" for run, label in zip(runs, labels)]


def curves(run):
    """{phase: {"stages": [[skill, updates]], "points": {metric: [[stage, step, value]]}}}"""
    phases = {}
    for row in run["metrics"]:
        step, skill = number(row.get("step")), str(row["skill"]) if row.get("skill") else None
        if step is None:
            continue
        phase = row.get("phase") or row.get("arm") or run["config"].get("method") or "training"
        curve = phases.setdefault(str(phase), {"stages": [], "points": {}})
        if not curve["stages"] or curve["stages"][-1][0] != skill:
            curve["stages"].append([skill, 0])
        curve["stages"][-1][1] = max(curve["stages"][-1][1], step)
        for metric in METRICS:
            value = number(row.get(metric))
            if value is not None:
                point = [len(curve["stages"]) - 1, step, value]
                curve["points"].setdefault(metric, []).append(point)
    base = phases.pop("base", {"points": {}})["points"]
    if len(phases) > 1:
        phases.pop("pretrain", None)  # which the arms have in common
    for curve in phases.values():
        for metric in [metric for metric in curve["points"] if metric in base]:
            if curve["points"][metric][0][:2] != [0, 0]:
                curve["points"][metric].insert(0, [0, 0, base[metric][0][2]])
    return phases


def thinned(items, n):
    """At most n of the items, evenly spaced from the first to the last."""
    if len(items) <= n:
        return items
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)]


def forgetting(arm):
    """When the prior accuracy began to fall: a sentence, and the point if it did."""
    points = arm["points"].get("prior")
    if not points:
        return None

    def at(point):
        return f"{point[2]:.2f} at {when(arm['stages'][point[0]][0], point[1])}"

    name, start, lowest = arm["label"], points[0], min(points, key=lambda point: point[2])
    fallen = [point for point in points if point[2] < start[2] - FALL]
    if not fallen:
        text = f"{name} does not forget: its prior accuracy is {at(start)} and never {FALL} lower."
        return {"text": text, "point": None}
    text = f"{name} forgets: its prior accuracy is {at(start)} and {at(fallen[0])}, the first loss "
    return {"text": f"{text}of more than {FALL}; lowest: {at(lowest)}.", "point": fallen[0]}


def when(skill, step):
    return (f"{skill}, " if skill else "") + f"step {step}"


def warnings(rows):
    """[when, sentence], each sentence once, with the first time."""
    first = {}
    for row in rows:
        sentences, at = row.get("warnings"), (row.get("phase"), row.get("skill"), row.get("step"))
        for sentence in sentences if isinstance(sentences, list) else []:
            first.setdefault(str(sentence), "{} {} step {}".format(*at).replace("None ", ""))
    lines = [[at, sentence] for sentence, at in first.items()]
    more = count(len(lines) - MAX_WARNINGS, "later warning")
    return lines[:MAX_WARNINGS] + [["", f"{more} in metrics.jsonl"]] * (len(lines) > MAX_WARNINGS)


def results_table(results):
    """{"columns", "rows": [[label, numbers]]}: all scores in results.json."""
    rows = []
    for name, scores in results.items():
        for row in scores if isinstance(scores, list) else [scores]:
            if name != "config" and isinstance(row, dict):
                numbers = {k: v for k, v in row.items() if number(v) is not None}
                label = f"{name}, after {row['after']}" if "after" in row else name
                rows += [(label, numbers)] if numbers else []
    columns = [*dict.fromkeys(k for _, numbers in rows for k in numbers)]
    return {"columns": columns, "rows": [[name, [n.get(k) for k in columns]] for name, n in rows]}


def choose(rows, labels):
    """The prompts with their responses, few enough for a page, and a note if not all are there."""
    groups, began = {}, {}
    for row in rows:
        # The model before training is an arm's student at step 0 of what it learned first.
        first = began.setdefault((row["run"], row["phase"]), row["skill"])
        row["untrained"] = row["step"] == 0 and row["skill"] == first
        tracks = groups.setdefault((row["prompt"], row["kind"], row["expected"]), {})
        tracks.setdefault((row["run"], row["phase"], row["role"]), []).append(row)
    new, prior = ([key for key in groups if key[1] == kind] for kind in ("new", "prior"))
    for n_prompts, n_rows in LIMITS:
        n_prior = max(n_prompts // 3, n_prompts - len(new))
        keys = new[: n_prompts - min(n_prior, len(prior))] + prior[:n_prior]
        tracks = [[thinned(track, n_rows) for track in groups[key].values()] for key in keys]
        prompts = [prompt_view(*key, track, labels) for key, track in zip(keys, tracks)]
        if len(json.dumps(prompts)) <= MAX_BYTES:
            break
    kept = sum(len(track) for group in tracks for track in group)
    note = f"Of {count(len(rows), 'response')} to {count(len(groups), 'prompt')} the page has "
    note += f"{kept:,}, to {count(len(keys), 'prompt')}, spread from the first to the last."
    return prompts, note if kept < len(rows) else None


def prompt_view(prompt, kind, expected, tracks, labels):
    """One prompt: its responses through training ("steps"), and the arms' last ones ("sides")."""
    contexts, steps, base, last, teacher = [], [], {}, {}, {}
    for track in tracks:
        arm, run = track[0]["arm"], track[0]["run"]
        if track[0]["role"] == "teacher":
            teacher.setdefault("teacher" + run, track[0])
            continue
        if track[0]["untrained"]:
            base.setdefault("base" + run, track[0])
        if arm is not None:
            last[labels[arm]] = track[-1]
        for row in track if arm is not None else []:
            context = [row["teacher_prompt"], row["demonstration"]]
            contexts += [context] if context not in contexts else []
            names = ("arm", "skill", "step", "correct", "divergence", "tokens")
            steps.append({name: row[name] for name in names} | {"context": contexts.index(context)})
    # Runs that share a base are told apart by their arms only.
    alike = len({row["response"] for row in base.values()}) == 1
    base = {"base": next(iter(base.values()))} if alike else base
    sides = [
        [who, row["response"], row["correct"], when(row["skill"], row["step"])]
        for who, row in (base | last | teacher).items()
    ]
    about = {"prompt": prompt, "kind": kind, "expected": expected, "contexts": contexts}
    return about | {"steps": steps, "sides": sides}


def render(data):
    """The page; nothing in the data can end the script element that holds it."""
    title = html.escape(", ".join(run["name"] for run in data["runs"]))
    before, after = TEMPLATE.read_text(encoding="utf-8").split("$DATA")
    data = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return before.replace("$TITLE", title) + data + after


if __name__ == "__main__":
    main()
