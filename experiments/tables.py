"""What the results look like: files, tables and figures."""

import json

import numpy as np

from data.files import write_whole

# --- Files ---------------------------------------------------------------------------------------


def load(folder):
    """The results in a folder: {experiment: content of its JSON file}."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def write(path, result):
    """A JSON file with one row a line."""
    about = json.dumps({k: v for k, v in result.items() if k != "rows"})
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    text = f'{about[:-1]}, "rows": [\n{rows}\n]}}\n'
    write_whole(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


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
    size = 1.5 + 4 * len(panels), 3.4
    drawn, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for panel, (title, lines) in zip(axes[0], panels.items()):
        for name, values in lines.items():
            (mean, sd), fmt = mean_and_sd(values), "k--o" if name in ("base", "prior") else "-o"
            panel.errorbar(range(len(mean)), mean, sd, fmt=fmt, label=name, capsize=3, markersize=4)
        panel.set(title=title, xlabel=xlabel, ylim=(-0.03, 1.05))
        panel.set_xticks(range(len(ticks)), ticks)
    axes[0, 0].set_ylabel(ylabel)
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


def draw(figure, rows, path):
    """Write figure(rows, plt) as a PNG, with a grid and a legend, if matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure, since matplotlib is missing: pip install matplotlib")
        return
    plt.switch_backend("Agg")
    drawn = figure(rows, plt)
    for panel in drawn.axes:
        panel.grid(alpha=0.3)
    # Beside the last panel, where it hides nothing.
    drawn.axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    save = dict(format="png", dpi=150, bbox_inches="tight")
    write_whole(path, lambda tmp: drawn.savefig(tmp, **save))
    plt.close(drawn)
    print(f"wrote {path}")
