"""What the experiments guarantee: they run, resume, judge by one rule, and fill the README.

What every one of them measures is in test_measures.py.
"""

import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import train_toy
from data import toy
from experiments import all as all_of_them
from experiments import common, forgetting_law, kl, report, runner, search, sequential, tables
from experiments.settings import METHODS, chosen
from experiments.worlds import WORLDS

EXPERIMENTS = {e.name: e for e in all_of_them.EXPERIMENTS}
REPORTED = {e.name: e for e in all_of_them.REPORTED}
RESULTS = tables.load(report.RESULTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all, so that the miniature bases are made once."""
    return tmp_path_factory.mktemp("experiments")


def run(experiment, folder, *more):
    """The command line's results."""
    runner.main("", experiment, argv=["--quick", "--jobs", "1", "--out_dir", str(folder), *more])
    return json.loads((folder / f"{experiment.name}.json").read_text())


def kind(arm):
    """Arms of one kind differ in numbers alone."""
    method = arm.get("settings", {}).get("method")
    return str([[*arm], *(arm.get(key) for key in ("world", "text", "name", "kind")), method])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_as_its_committed_results_did(name, folder, tmp_path, monkeypatch):
    """With the same metrics, of which claims and figures are made; every process has its arms."""
    experiment, committed = EXPERIMENTS[name], RESULTS[name]["rows"]
    sent = experiment.measure, experiment.arms
    assert pickle.loads(pickle.dumps(sent)) == sent
    one_of = {kind(arm): i for i, arm in reversed([*enumerate(experiment.arms)])}
    monkeypatch.setattr(common, "MODEL", common.MODEL | dict(n_layer=1, n_embd=16))
    monkeypatch.setattr(kl, "PROMPTS", 1)
    few = dict(arms=[experiment.arms[i] for i in one_of.values()], figure=None)
    rows = run(replace(experiment, bases=experiment.bases[-1:], **few), folder)["rows"]
    for row, i in zip(rows, one_of.values(), strict=True):
        assert row["arm"] == committed[i]["arm"]
        assert {*committed[i]["metrics"]} - {"end"} <= {*row["metrics"]}  # which is derived
        assert all(len(v) == 1 and np.isfinite(v[0]) for v in row["metrics"].values())
    if experiment.figure:
        tables.draw(experiment.figure, committed, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"


# --- The runner ----------------------------------------------------------------------------------


@pytest.fixture
def fake():
    """An experiment whose arms take no time, and the list of its runs."""
    ran = []

    def measure(seed, x, settings=None):
        ran.append((seed, x))
        return {"accuracy": seed + x / 10} | ({"odd": 1} if seed == 1 else {})

    arms = [dict(arm="a", family="f", rate=0.5, x=1, settings=dict(method=min)), dict(arm="b", x=2)]
    return runner.Experiment("fake", arms, measure, ["accuracy"], bases=()), ran


def test_results_have_an_arm_a_line_with_fields_and_seeds(fake, tmp_path, capsys):
    """A metric may be of some seeds only; what functions an arm was made with is not told."""
    torch.set_num_threads(2)
    result = run(fake[0], tmp_path, "--seeds", "2")
    assert torch.get_num_threads() == 1  # so that numbers depend neither on --jobs nor on cores
    lines = (tmp_path / "fake.json").read_text().splitlines()
    a = dict(arm="a", family="f", rate=0.5, x=1, metrics={"accuracy": [0.1, 1.1], "odd": [1]})
    assert json.loads(lines[1].rstrip(",")) == a | dict(seconds=[0, 0]) and len(lines) == 4
    about = dict(experiment="fake", seeds=[0, 1], seconds=0, torch=torch.__version__)
    assert about.items() <= result.items() and result["machine"]
    assert "| a at 0.5 | 0.60 ± 0.71 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, words",
    [(KeyboardInterrupt, "goes on after the last"), (torch.cuda.OutOfMemoryError, "fewer --jobs")],
)
def test_resuming_equals_running_through(error, words, fake, tmp_path):
    """A sentence tells what ended it; only the arm in flight and a line cut short are lost."""
    experiment, ran = fake

    def interrupted(seed, x, **settings):
        if len(ran) == 3:
            raise error
        return experiment.measure(seed, x)

    through = run(experiment, tmp_path / "through", "--seeds", "2")
    ran.clear()
    with pytest.raises(SystemExit, match=f"; the same command .*{words}"):
        run(replace(experiment, measure=interrupted), tmp_path, "--seeds", "2")
    assert not (tmp_path / "fake.json").exists()
    log = tmp_path / "fake.jsonl"
    log.write_text(log.read_text()[:-20])
    for _ in range(2):  # the second time everything is there
        assert run(experiment, tmp_path, "--seeds", "2") == through
    assert ran[3:] == [(1, 1), (1, 2)]


def test_only_what_changed_runs_again(fake, tmp_path):
    """More seeds, an arm's settings or its method alone; flags and data for all."""
    experiment, ran = fake
    a, b = experiment.arms
    for changes, again in [
        ({}, [(0, 1), (0, 2), (1, 1), (1, 2)]),
        (dict(arms=[dict(arm="a", x=3), b]), [(0, 3), (1, 3)]),
        (dict(arms=[a | dict(settings=dict(method=max))]), [(0, 1), (1, 1)]),
        (dict(arms=[b], arguments=lambda p: p.set_defaults(device="mps")), [(0, 2), (1, 2)]),
        (dict(arms=[b], files=[report.CLAIMS]), [(0, 2), (1, 2)]),
    ]:
        ran.clear()
        run(replace(experiment, **changes), tmp_path, "--seeds", "2")
        assert ran == again
    assert {"sdft.py", "model.py", "common.py"} <= {path.name for path in runner.CORE}


def test_arms_and_experiments_can_be_picked(fake, tmp_path, capsys):
    """Costly arms: last, on seed 0, not with --quick, which has its own. A name: that one alone."""
    experiment, ran = fake
    once, other = replace(experiment, once=["a"]), replace(experiment, name="other", once=["b"])
    flags = ["--jobs=1", "--out_dir", str(tmp_path)]
    runner.main("", once, other, argv=["fake", *flags, "--seeds", "2"])
    run(once, tmp_path / "quick")
    run(replace(experiment, quick=["a"]), tmp_path / "named")
    assert ran == [(0, 2), (1, 2), (0, 1), (0, 2), (0, 1)]
    for wrong in ("another", "--seeds=0", "--jobs=0"):
        with pytest.raises(SystemExit):
            runner.main("", once, other, argv=[*flags, wrong])
        assert "are at least 1, names among fake, other" in capsys.readouterr().err


def test_a_base_is_reused_from_its_file(tmp_path, capsys, monkeypatch):
    """Made once per seed, world and size; other code makes it again."""
    vars(common.options).update(out_dir=tmp_path, quick=True)
    size = dict(n_layer=1, n_embd=16)
    first, again = common.base(0, **size), common.base(0, **size)
    assert capsys.readouterr().out.count("pretraining a base") == 1
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    common.base(1, **size), common.base(0, "long", **size), common.base(0, n_layer=2, n_embd=16)
    assert len([*(tmp_path / "bases").iterdir()]) == 4
    monkeypatch.setattr(common, "MADE_BY", common.MADE_BY[1:])
    assert torch.equal(common.base(0, **size).wte.weight, first.wte.weight)
    assert capsys.readouterr().out.count("pretraining a base") == 4


# --- Settings and verdicts -----------------------------------------------------------------------


def test_settings_are_what_the_sweeps_chose():
    """The constants of settings.py and search.py against the committed results."""
    rates = {family: method["lr"] for family, method in METHODS.items()}
    for sweep, constants in {"pareto": rates, "search_rates": search.CHOSEN}.items():
        best = chosen(RESULTS[sweep]["rows"], EXPERIMENTS[sweep].choose_by)
        assert {row["arm"]: row["rate"] for row in best if row["arm"] in constants} == constants


def test_intervals_and_p_values_are_students():
    """Two-sided .05 by the tables of Student's t; an interval that touches zero has p = .05."""
    for n, t in {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262, 30: 2.045}.items():
        values = np.arange(n) / 10
        mean, half = report.interval(values)
        assert half == pytest.approx(t * np.std(values, ddof=1) / n**0.5, rel=0.001)
        assert report.p_value(values - mean + half) == pytest.approx(0.05, abs=1e-4)
    assert report.p_value([0.0, 0.0, 0.0]) == pytest.approx(1)
    assert report.p_value([1.0, 1.0, 1.0]) < 1e-4


def test_yes_that_stand_by_benjamini_hochberg_and_by_holm():
    """Of five p-values, by hand: thresholds .01 .02 .03 .04 .05, and .01 .0125 .0167 .025 .05."""
    tests = [(0.021, True), (0.005, True), (0.035, False), (0.012, True), (0.2, True)]
    assert report.surviving(tests) == (3, 2)


VERDICTS = [  # the values of more and of than, a seed each, and their unit
    ([0.9, 0.5, 0.1], [0.7, 0.3, -0.1], "accuracy", "yes (+0.20 ± 0.00)"),  # of every seed
    ([0.90, 0.92, 0.91], [0.82, 0.82, 0.82], "nats", "undecided (+0.09 ± 0.02)"),
    ([0.88, 0.90, 0.89], [0.98, 0.98, 0.98], "nats", "undecided (-0.09 ± 0.02)"),
    ([0.9, 0.3, 0.6], [0.4, 0.4, 0.4], "accuracy", "undecided (+0.20 ± 0.75)"),
    ([0.4, 0.4, 0.4], [0.9, 0.3, 0.6], "accuracy", "undecided (-0.20 ± 0.75)"),
    ([0.9], [0.4], "accuracy", "cannot be tested here: one seed"),
    ([], [], "gap", "cannot be tested here"),
    (0.1, 0.0, "number", "yes"),
    (0.0, 0.0, "number", "no"),
    # Where both have all or nothing, nothing can show; but nats have no ceiling.
    ([0.99, 0.99], [1.0, 1.0], "accuracy", "cannot be tested here: both at the ceiling"),
    ([0.01, 0.01], [0.0, 0.0], "accuracy", "cannot be tested here: both at the floor"),
    ([0.97, 0.97], [1.0, 1.0], "accuracy", "the reverse (-0.03 ± 0.00)"),
    ([0.97, 0.97], [1.0, 1.0], "facts", "cannot be tested here: both at the ceiling"),
    ([0.90, 0.92, 0.91], [0.95, 0.95, 0.95], "nats", "no difference (-0.04 ± 0.02)"),
]


@pytest.mark.parametrize("more, than, unit, expected", VERDICTS)
def test_a_verdict_needs_interval_and_margin(more, than, unit, expected):
    metrics = {"a": {"new": more}, "b": {"new": than}}
    row = dict(metric="new", more="a", than="b", unit=unit, here="", cannot="")
    assert report.judge(row, metrics)[2] == expected


# --- The report ----------------------------------------------------------------------------------


def test_the_report_takes_over_a_run(tmp_path, monkeypatch):
    """Results, figures and the forgetting law, as committed; files of other arms change nothing."""
    run = tmp_path / "run"
    for name in ("RESULTS", "FIGURES", "README"):
        monkeypatch.setattr(report, name, tmp_path / name)
    for path in (report.RESULTS, report.FIGURES, run):
        path.mkdir()
    report.README.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in REPORTED))
    for name in forgetting_law.SOURCES:
        tables.write(run / f"{name}.json", RESULTS[name])
    tables.write(run / "kl.json", RESULTS["kl"] | {"rows": RESULTS["kl"]["rows"][1:]})
    with pytest.raises(SystemExit, match="kl.json has other arms than its code; run kl again"):
        report.main([str(run)])
    assert not [*report.RESULTS.iterdir()]
    tables.write(run / "kl.json", RESULTS["kl"])
    report.main([str(run)])
    results = tables.load(report.RESULTS)
    assert results.keys() == {*forgetting_law.SOURCES, "forgetting_law"}
    pairs = (found["forgetting_law"]["rows"] for found in (results, RESULTS))
    for row, committed in zip(*pairs, strict=True):
        assert row["arm"] == committed["arm"]
        assert row["metrics"] == {k: pytest.approx(v) for k, v in committed["metrics"].items()}
    assert (report.FIGURES / "forgetting_law.png").exists()
    assert report.README.read_text().count(report.MISSING) == len(REPORTED) - len(results)


def test_the_readme_is_what_the_report_writes():
    """Text and committed results cannot drift apart; linked files and commands are there."""
    text, here = report.README.read_text(encoding="utf-8"), report.HERE
    assert set(RESULTS) >= set(REPORTED)
    assert report.rewritten(text, RESULTS) == text
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (here / link).exists(), link
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        assert (here / f"{name}.py").exists(), name


def test_the_toy_over_seeds_is_that_of_train_toy():
    """Its settings are the defaults of train_toy.py."""
    args, methods = train_toy.parse_args([]), sequential.TOY_METHODS
    for name, lr, steps in [("sft", args.sft_lr, args.sft_steps), ("sdft", args.lr, args.steps)]:
        expected = dict(lr=lr, steps=steps, batch_size=args.batch_size, style="expert")
        assert expected.items() <= methods[name].items()
    assert WORLDS["toy"][1] == args.pretrain_steps and args.ema_alpha == 0.02


def test_the_front_page_shows_the_committed_results(capsys):
    """Its table is seed 0's, as train_toy.py prints it; what is left after three skills, means."""
    page = (report.HERE.parent / "README.md").read_text(encoding="utf-8")
    arms = {row["arm"]: row["metrics"] for row in RESULTS["toy"]["rows"]}
    of = lambda arm, stage: {k: arms[arm][f"{stage}{k}"][0] for k in (*toy.NEW, "prior")}
    results = {"base": {"after": "base"} | of("base", "")}
    for arm in ("sft", "sdft"):
        results[arm] = [{"after": k} | of(arm, f"after {k}: ") for k in toy.NEW]
    train_toy.print_table(results)
    assert capsys.readouterr().out.strip() in page
    for name, words in ("toy", "{} of the prior skills, SFT {}"), ("sequential", "{} and {}"):
        prior = {row["arm"]: np.mean(row["metrics"]["prior"]) for row in RESULTS[name]["rows"]}
        means = (f"{prior[arm]:.2f}"[1:] for arm in ("sdft", "sft"))
        assert f"[{words.format(*means)}]" in page


def test_committed_results_have_a_value_per_seed():
    """But not every run gets to nine tenths of the facts. An arm's rate is that of its training."""
    for name, experiment in REPORTED.items():
        assert all(a["settings"]["lr"] == a["rate"] for a in experiment.arms if "rate" in a)
        n_seeds = len(RESULTS[name]["seeds"])
        for row in RESULTS[name]["rows"] if n_seeds else []:  # the forgetting law has none
            expected = 1 if row["arm"] in experiment.once else n_seeds
            for metric, values in row["metrics"].items():
                assert len(values) == expected or metric.endswith(" .90") and values
