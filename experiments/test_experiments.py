"""What the experiments guarantee: they run, score what they name, resume, and fill the README.

What every one of them measures is in test_measures.py.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data import scoring, toy
from experiments import all as all_of_them
from experiments import (
    common,
    context,
    controls,
    estimators,
    forgetting_law,
    hf_loop,
    instructions,
    knowledge,
    mismatch,
    on_policy,
    pareto,
    real_controls,
    real_grid,
    real_model,
    report,
    runner,
    sequential,
    settings,
    teacher,
    teacher_weights,
    verdicts,
)

HERE = Path(__file__).parent
WITH_CLAIMS = {name: importlib.import_module(f"experiments.{name}") for name in report.CLAIMING}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all, so that the miniature bases are made once."""
    return tmp_path_factory.mktemp("experiments")


@pytest.fixture(autouse=True)
def restore_the_process():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    vars(common.options).clear()
    vars(common.options).update(before)


@pytest.fixture
def quick():
    common.options.quick = True


def flags(folder, *more):
    return ["--quick", "--jobs", "1", "--out_dir", str(folder), *more]


def result_of(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    return {key: value for key, value in result.items() if key != "seconds"}


def kind(arm):
    """Arms of one kind differ in numbers alone."""
    step = (arm.get("settings") or arm).get("step")
    return str([[*arm], arm.get("world"), arm.get("text"), arm.get("name"), step])


@pytest.mark.parametrize("name", all_of_them.NAMES)
def test_every_experiment_runs_and_is_reported(name, folder, monkeypatch, capsys):
    """A crash in any kind of arm; a column, a claim or a figure that asks for what is not there."""
    module = WITH_CLAIMS[name]
    arms, figure = module.ARMS, getattr(module, "figure", None)
    one_of = {kind(settings): arm for arm, settings in reversed(arms.items())}
    monkeypatch.setattr(module, "ARMS", {arm: arms[arm] for arm in reversed(one_of.values())})
    monkeypatch.delattr(module, "figure", raising=False)
    monkeypatch.setattr(common.base, "__defaults__", ("skills", 1, 16))  # these three for speed
    monkeypatch.setattr(toy, "PRIOR", {"A": toy.PRIOR["A"]})
    monkeypatch.setattr(estimators, "PROMPTS", 1)
    runner.main(name, flags(folder))
    result = json.loads((folder / f"{name}.json").read_text())
    assert set(result) == {"experiment", "seeds", "rows", "seconds"}
    assert (result["experiment"], result["seeds"]) == (name, [0])
    assert [row["arm"] for row in result["rows"]] == [*module.ARMS]
    for row in result["rows"]:
        assert set(row) == {"arm", "metrics"} and row["metrics"]
        values = row["metrics"].values()
        assert all(len(v) == 1 and isinstance(v[0], float) and np.isfinite(v[0]) for v in values)
    printed = capsys.readouterr().out
    for column in module.COLUMNS:
        assert any(column in row["metrics"] for row in result["rows"]) and column in printed
    monkeypatch.setattr(module, "ARMS", arms)
    # The report and the figure have all arms: each takes the numbers of its kind, on two seeds.
    metrics = {row["arm"]: {k: v * 2 for k, v in row["metrics"].items()} for row in result["rows"]}
    rows = [{"arm": arm, "metrics": metrics[one_of[kind(arms[arm])]]} for arm in arms]
    claims = [*report.claims_table({name: {"rows": rows, "seeds": [0, 1]}})]
    cells = [line[2:-2].split(" | ") for line in claims[2:] if report.MISSING not in line]
    assert cells and all(re.match("yes|no |undecided|cannot", verdict) for *_, verdict, _ in cells)
    if figure:
        runner.draw(figure, rows, folder / "figure.png")
        assert (folder / "figure.png").read_bytes()[1:4] == b"PNG"
        (folder / "figure.png").unlink()


def test_no_experiment_is_left_out():
    """Every file with arms is among those that `all` runs, but for the real model's."""
    with_arms = {path.stem for path in HERE.glob("*.py") if "\nARMS" in path.read_text()}
    assert {name for name in with_arms if not name.startswith("real_")} == {*all_of_them.NAMES}


@pytest.mark.parametrize("name", report.NAMES)
def test_every_docstring_has_claim_and_command(name):
    """--help prints it: what was found elsewhere, a command that works, no prediction."""
    doc = importlib.import_module(f"experiments.{name}").__doc__
    assert re.search("paper|arXiv", doc) and f"python -m experiments.{name} " in doc
    assert "expect " not in doc.lower()


# --- The runner ----------------------------------------------------------------------------------


@pytest.fixture
def without_arms(monkeypatch):
    """Arms that take no time; the list of those that ran."""
    ran = []

    def run_arm(name, seed, arm):
        ran.append((seed, arm))
        return dict(arm=arm, seed=seed, metrics={"accuracy": 1.0}, seconds=1)

    monkeypatch.setattr(runner, "run_arm", run_arm)
    monkeypatch.setattr(runner, "make_bases", lambda *a: None)
    return ran


def test_all_runs_every_experiment_in_turn(tmp_path, without_arms, monkeypatch, capsys):
    """One command for everything, with its bases made first."""
    monkeypatch.setattr(all_of_them, "NAMES", ["teacher", "context"])
    all_of_them.main(flags(tmp_path))
    assert (tmp_path / "teacher.json").exists() and (tmp_path / "context.json").exists()
    assert [arm for _, arm in without_arms] == [*teacher.ARMS, *context.ARMS]
    printed = capsys.readouterr().out
    assert "bases: 2 for each of 1 seeds" in printed and "[2/2," in printed


def test_resuming_equals_running_through(tmp_path, monkeypatch):
    """An interruption loses the arm in flight and a line cut short, and nothing else."""
    n, calls = len(teacher.ARMS), []

    def measure(seed, **settings):
        calls.append(settings)
        if len(calls) == n + 4:
            raise KeyboardInterrupt
        return {"accuracy": len(str(settings)), "KL": 0.1}

    monkeypatch.setattr(teacher, "measure", measure)
    monkeypatch.setattr(runner, "make_bases", lambda *a: None)
    runner.main("teacher", flags(tmp_path / "through"))
    with pytest.raises(SystemExit, match="the same command goes on"):
        runner.main("teacher", flags(tmp_path))
    assert not (tmp_path / "teacher.json").exists()
    log = tmp_path / "teacher.jsonl"
    log.write_text(log.read_text()[:-20])
    runner.main("teacher", flags(tmp_path))
    assert calls[n + 4 :] == [*teacher.ARMS.values()][2:]
    assert result_of(tmp_path, "teacher") == result_of(tmp_path / "through", "teacher")
    runner.main("teacher", flags(tmp_path))
    assert len(calls) == n + 4 + n - 2  # no finished arm runs again


def test_changed_code_runs_arms_again(tmp_path, without_arms, monkeypatch):
    """Results of other code must not be taken for these; more seeds run the new ones only."""
    arms = [*teacher.ARMS]
    runner.main("teacher", flags(tmp_path))
    runner.main("teacher", flags(tmp_path, "--seeds", "2"))
    assert without_arms == [(0, arm) for arm in arms] + [(1, arm) for arm in arms]
    numbers = runner.fingerprint(teacher, True) | {"sdft": 1}
    monkeypatch.setattr(runner, "fingerprint", lambda *a: numbers)
    without_arms.clear()
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, "sdft")]


@pytest.mark.parametrize("quick", [True, False])
def test_costly_arms_run_once_and_last(quick, tmp_path, without_arms, monkeypatch):
    """ONCE: on seed 0 alone, after all others, and not with --quick."""
    monkeypatch.setattr(teacher, "ARMS", {"teacher": dict(read="teacher_prompts"), "base": {}})
    monkeypatch.setattr(teacher, "ONCE", ["teacher"], raising=False)
    more = ["--quick"] if quick else []
    runner.main("teacher", ["--jobs", "1", "--out_dir", str(tmp_path), "--seeds", "2", *more])
    assert without_arms == [(0, "base"), (1, "base")] + [(0, "teacher")] * (not quick)


def test_quick_runs_the_arms_named_for_it(quick, tmp_path, without_arms, monkeypatch):
    """QUICK, where all arms would take too long to see that it runs."""
    monkeypatch.setattr(teacher, "QUICK", ["base"], raising=False)
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, "base")]


@pytest.mark.parametrize(
    "module, part",
    [(teacher, runner.train_toy), (teacher, runner.toy), (teacher, runner.sdft)]
    + [(teacher, runner.model), (teacher, common), (teacher, teacher)]
    + [(context, knowledge), (controls, on_policy), (teacher_weights, mismatch)]
    + [(real_model, scoring), (real_controls, hf_loop), (real_grid, instructions)],
)
def test_the_fingerprint_covers_all_code(module, part, monkeypatch):
    """Every file behind an arm's numbers counts; comments do not."""

    def fingerprint():
        args = argparse.Namespace(model=None, dtype="float32", device="cpu")
        inputs = module.inputs(args) if hasattr(module, "inputs") else ""
        return runner.fingerprint(module, True, inputs)

    source, before = runner.inspect.getsource, fingerprint()
    for text, same in [("\n# a comment", True), ("\nnew = 1", False)]:
        monkeypatch.setattr(runner.inspect, "getsource", lambda p: source(p) + text * (p is part))
        now = fingerprint()
        assert all((before[arm] == now[arm]) == same for arm in before)


def test_the_fingerprint_covers_settings(monkeypatch):
    """An arm's settings count for that arm alone, --quick and the inputs for all."""
    before = runner.fingerprint(teacher, quick=True)
    for other in (runner.fingerprint(teacher, False), runner.fingerprint(teacher, True, "data")):
        assert all(before[arm] != other[arm] for arm in before)
    changed = {"lr": dict(settings.SDFT, lr=0.5), "step": settings.SFT}
    for new in changed.values():
        monkeypatch.setitem(teacher.ARMS, "sdft", dict(settings=new))
        now = runner.fingerprint(teacher, quick=True)
        assert {arm for arm in before if before[arm] != now[arm]} == {"sdft"}


def test_parallel_processes_give_the_same_results(folder):
    """Two processes' numbers are one's: each has the options, and one thread."""

    def metrics(jobs):
        args = runner.parse_args("", flags(folder, "--jobs", jobs))
        runner.make_bases([0], teacher.WORLDS, args)
        tasks = [("teacher", 0, arm) for arm in ("base", "teacher")]
        return {r["arm"]: r["metrics"] for r in runner.in_processes(runner.run_arm, tasks, args)}

    one, two = metrics("1"), metrics("2")
    assert one == two and set(two) == {"base", "teacher"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_behind(number, folder, monkeypatch):
    """Workers end with their parent, and a sentence tells how to go on."""
    started = []
    if number == signal.SIGINT:  # a shell's background jobs ignore it
        signal.signal(number, signal.default_int_handler)

    def interrupted(futures):
        started.extend(multiprocessing.active_children())
        os.kill(os.getpid(), number)
        time.sleep(5)  # the signal ends it before

    monkeypatch.setattr(runner, "as_completed", interrupted)
    with pytest.raises(SystemExit, match="the same command goes on"):
        runner.main("kl", flags(folder, "--jobs", "2", "--seeds", "2"))
    assert len(started) == 2
    for process in started:
        process.join(timeout=10)
        assert not process.is_alive()


@pytest.mark.parametrize("cause", [torch.cuda.OutOfMemoryError, runner.BrokenProcessPool])
def test_a_full_memory_is_told(cause):
    """A GPU's, or the machine's, which ends the process."""
    with pytest.raises(SystemExit, match="memory is full.*fewer --jobs"):
        with runner.errors_as_sentences():
            raise cause


@pytest.mark.parametrize(
    "more, words",
    [
        (["--seeds", "0"], "--seeds"),
        (["--jobs", "0"], "--jobs"),
        (["--out_dir", "F/x"], "--out_dir"),
    ],
)
def test_a_wrong_command_line_is_named(more, words, tmp_path, monkeypatch, capsys):
    """One sentence with the flag, no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("F").touch()  # a file, so that F/x cannot be a folder
    with pytest.raises(SystemExit) as stop:
        runner.main("teacher", more)
    assert words in str(stop.value) + capsys.readouterr().err


# --- Bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["{}", "5", "null", "[" * 10**5, "1" * 5000, '"\\ud800"', "NaN"]
    + ['{"arm": "base", "seed": 0, "code": CODE}', '{"arm": "base", "seed": [], "code": CODE}']
    + ['{"arm": [], "seed": 0, "code": CODE, "seconds": 1, "metrics": {"accuracy": 1}}']
    + [
        '{"arm": "base", "seed": 0, "code": CODE, "seconds": 1, "metrics": %s}' % metrics
        for metrics in ("{}", "5", '{"accuracy": "1"}', '{"accuracy": null}', '{"accuracy": NaN}')
    ],
)
def test_a_damaged_log_line_runs_its_arm_again(line, tmp_path, without_arms):
    """Of whatever kind; finished arms beside it are kept."""
    code = runner.fingerprint(teacher, True)
    line = line.replace("CODE", str(code["base"]))
    (tmp_path / "teacher.jsonl").write_bytes(b"\xff\x00" + line.encode() + b"\n" + line.encode())
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, arm) for arm in teacher.ARMS]
    runner.main("teacher", flags(tmp_path))
    assert without_arms == [(0, arm) for arm in teacher.ARMS]


def wait_for_ever(name):
    Path(name).write_text(str(os.getpid()))
    time.sleep(200)


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    """kill -9 cannot be caught, and a worker that is left holds memory and a core."""
    parent = multiprocessing.get_context("spawn").Process(target=start_two, args=[tmp_path])
    parent.start()
    names = [tmp_path / "0", tmp_path / "1"]
    deadline = time.monotonic() + 120
    while not all(name.exists() and name.read_text() for name in names):
        assert time.monotonic() < deadline and parent.is_alive()
        time.sleep(0.1)
    parent.kill()
    for name in names:
        while Path(f"/proc/{name.read_text()}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def start_two(folder):
    args = runner.parse_args("", flags(folder, "--jobs", "2"))
    for _ in runner.in_processes(wait_for_ever, [(str(folder / name),) for name in "01"], args):
        pass


def test_a_base_is_reused_from_its_file(quick, tmp_path, capsys):
    """Made once per seed, world and size; other settings make it again; damage is named."""
    common.options.out_dir = tmp_path
    size = dict(n_layer=1, n_embd=16)
    first, again = common.base(0, **size), common.base(0, **size)
    assert capsys.readouterr().out.count("pretraining a base") == 1
    assert (len(first.h), first.wte.embedding_dim) == (1, 16)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    [path] = (tmp_path / "bases").iterdir()
    assert common.load_base(path, common.base_config(0, 21, "skills", size)) is None
    good = path.read_bytes()
    at = good.index(first.wte.weight.detach().numpy().tobytes())
    for bad in (good[:1000], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]):  # or a bit flips
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged or not a base; delete it"):
            common.base(0, **size)


@pytest.mark.parametrize("part", [toy, common.model_file, common.world_batch, common.pretrain])
def test_a_bases_configuration_covers_its_origin(part, monkeypatch):
    """Seed, updates, world, size, and the code that made it."""
    this = (0, 20, "skills", {"n_embd": 16})
    before = common.base_config(*this)
    for i, other in enumerate([1, 21, "facts", {"n_embd": 32}]):
        assert common.base_config(*this[:i], other, *this[i + 1 :]) != before
    source = common.inspect.getsource
    monkeypatch.setattr(
        common.inspect, "getsource", lambda p: source(p) + "\nnew = 1" * (p is part)
    )
    assert common.base_config(*this) != before


def test_the_long_world_has_five_digits_and_one_new_skill():
    """The lines of data/toy.py, of which Y and Z are unknown there."""
    batch, told = common.world_batch("long"), {"X": [], "Y": []}
    for seed in range(60):
        prompts, answers = batch(np.random.default_rng(seed), 64, 0)
        names, digits = prompts[:, 1], prompts[:, 2:7]
        assert answers.shape == (64, 5) and digits.max() < 10
        for name in told:
            rows = names == toy.VOCAB.index(name)
            tables = np.broadcast_to(toy.TABLES[toy.NAMES.index(name)], (64, 10, 10))
            told[name] += [*(toy.solve(tables, digits) == answers[:, :-1]).all(1)[rows]]
    assert np.mean(told["X"]) > 0.4 and np.mean(told["Y"]) < 0.05


# --- Settings, verdicts and the report -----------------------------------------------------------


def test_a_family_gets_every_rate_or_its_own():
    """With the same number of updates unless it names another, and no rates in the settings."""
    arms = settings.grid({"a": {"step": 1}, "b, c": {"step": 2, "rates": (1e-3,), "steps": 7}})
    assert arms.pop("b, c at 0.001") == {"step": 2, "steps": 7, "lr": 1e-3}
    assert [*arms.values()] == [{"step": 1, "steps": 160, "lr": lr} for lr in settings.RATES]


def sweep_row(arm, new, prior, **more):
    metrics = {"val new": [new, new], "val prior": [prior, prior], "new": [0], "prior": [0]}
    return {"arm": arm, "metrics": metrics | more}


def test_settings_are_chosen_by_validation_alone():
    """Of the arms within .02 of the best, the one that keeps most."""
    rows = [sweep_row("base", 1, 1), sweep_row("a at 1", 0.9, 0.2), sweep_row("a at 2", 0.89, 0.7)]
    rows += [sweep_row("a at 3", 0.8, 0.9), sweep_row("b at 1", 0, 0)]
    assert settings.chosen(rows) == {"a": "a at 2", "b": "b at 1"}


SWEPT = {"sft": settings.SFT, "sft, own style": settings.SFT_OWN, "sdft": settings.SDFT}
SWEPT |= {"sdft, forward KL": settings.SDFT_FORWARD, "sdft, JSD": settings.SDFT_JSD}


@pytest.mark.parametrize("family", SWEPT)
def test_settings_are_what_the_sweeps_chose(family):
    """The constants of settings.py against the committed results, and the family's settings."""
    rows = report.load(report.RESULTS)["pareto"]["rows"]
    arm = settings.chosen(rows, *pareto.SWEEP)[family]
    assert pareto.ARMS[arm]["settings"] == SWEPT[family]


@pytest.mark.parametrize("n", [2, 3, 5, 10, 11, 30])
def test_the_interval_covers_95_percent_of_students_t(n):
    """The density of t with n - 1 degrees of freedom, integrated up to half the width."""
    values, v = np.arange(n) / 10, n - 1
    mean, half = verdicts.interval(values)
    t = half / (np.std(values, ddof=1) / math.sqrt(n))
    x = np.linspace(0, t, 100001)
    density = (1 + x**2 / v) ** (-(v + 1) / 2)
    density *= math.gamma((v + 1) / 2) / math.gamma(v / 2) / math.sqrt(v * math.pi)
    covered = 2 * (density.sum() - density[[0, -1]].mean()) * (x[1] - x[0])
    assert mean == pytest.approx(v / 20) and covered == pytest.approx(0.95, abs=0.002)


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([0.10, 0.12, 0.11], r"yes (+0.11 ± 0.02)"),
        ([0.010, 0.012, 0.011], r"no (+0.01 ± 0.00)"),  # too small to count
        ([-0.10, -0.12, -0.11], r"no (-0.11 ± 0.02)"),
        ([0.5, -0.1, 0.2], r"undecided (+0.20 ± 0.75)"),
        ([-0.5, 0.1, -0.2], r"undecided (-0.20 ± 0.75)"),
        ([0.5], "cannot be tested here: one seed"),
    ],
)
def test_a_verdict_needs_interval_and_margin(differences, verdict):
    """Taken seed by seed: what all seeds share drops out."""
    start = np.linspace(0.1, 0.9, len(differences))
    assert verdicts.more(start + differences, start) == verdict


@pytest.mark.parametrize("after, word", [(0.97, "yes"), (0.95, "no"), (0.90, "no")])
def test_kept_means_the_named_share(after, word):
    """More than .95 of what was there before, by however little."""
    before = np.array([0.8, 0.9, 1.0])
    assert verdicts.kept(after * before, before, 0.95).startswith(word)


@pytest.mark.parametrize("name", WITH_CLAIMS)
def test_no_claim_holds_if_nothing_differs(name):
    """A rule that is true of equal numbers would say yes to everything."""
    zeros = 0.0 if name == "forgetting_law" else np.zeros(5)
    for claim, _, _, verdict in WITH_CLAIMS[name].claims(lambda *where: zeros):
        assert not verdict.startswith("yes"), claim


def claim(module, start, **values):
    """Here and verdict of the claim that starts so; metrics without a value are 0."""
    at = lambda arm, metric: np.array(values.get(f"{arm}: {metric}", [0.0, 0.0, 0.0]))
    return next(c[2:] for c in module.claims(at) if c[0].startswith(start))


def test_only_matched_seeds_count_as_matched():
    """An SFT that never got there has not been compared; the kindest rate stands for SFT."""
    values = {"sdft: prior": [0.9, 0.92, 0.1]}
    values |= {"sft stopped, 0.002: matched": [1, 1, 0], "sft stopped, 0.0006: matched": [1, 0, 0]}
    values |= {
        "sft stopped, 0.0006: prior": [0.99] * 3,
        "sft stopped, 0.002: prior": [0.2, 0.22, 0.9],
    }
    here, verdict = claim(pareto, "also if SFT stops", **values)
    assert "SFT at 0.002 on 2 seeds" in here and verdict.startswith("yes (+0.70")
    values |= {
        "sft stopped, 0.0002: matched": [1, 1, 1],
        "sft stopped, 0.0002: prior": [0.9, 0.92, 0.1],
    }
    here, verdict = claim(pareto, "also if SFT stops", **values)
    assert "SFT at 0.0002 on 3 seeds" in here and verdict.startswith("no (+0.00")
    values = {"sft stopped, 0.002: matched": [1, 0, 0]}
    assert claim(pareto, "also if SFT stops", **values)[1] == "cannot be tested here"


def test_lost_and_kept_are_in_the_papers_unit():
    """0 is the base and 1 the best that either method had right after X's stage."""
    values = {"base: X": [0.4] * 3, "sft: after X: X": [1.0] * 3, "sdft: after X: X": [0.9] * 3}
    values |= {"sft: X": [0.1, 0.16, 0.1], "sdft: X": [0.88, 0.88, 0.82]}
    here, verdict = claim(sequential, "SFT loses", **values)
    assert here.startswith("-0.47") and verdict.startswith(
        "yes (+0.97"
    )  # .5 is half of a gain of 1
    here, verdict = claim(sequential, "SDFT keeps the first", **values)
    assert here.startswith("0.77") and verdict.startswith("undecided (+0.07")


SHOWN = {  # an arm of a run, and how the forgetting law calls it
    "pareto": {"base": None, "sft at 0.0006": "SFT", "sft, own style at 2e-05": "SFT, own style"}
    | {"sdft, JSD at 2e-05": "SDFT", "sft stopped, 0.002": "SFT"},
    "controls": {"base": None, "sft + KL, w 0.3 at 0.002": "SFT + KL", "dft at 0.002": "DFT"}
    | {"sft + replay at 0.002": "replay", "sft + re-invoke at 0.0002": "re-invoke"}
    | {"offline, reverse KL at 6e-05": "offline", "sdft at 6e-05": None},  # pareto's again
    "demonstrations": {"8, sdft at 6e-05": "SDFT", "8, sft at 0.002": "SFT"},
    "mismatch": {"20% wrong": "SDFT", "20% wrong, sft in own style": "SFT, own style"},
    "teacher_weights": {"live": "SDFT"},
    "kl": {"reverse, sampled token": "SDFT"},
}


def test_the_forgetting_law_names_methods_and_fits(tmp_path, capsys):
    """Every trained model of the runs is a point; here loss is KL², and the other KL is noise."""
    rng, expected = np.random.default_rng(0), []
    for name, shown in SHOWN.items():
        rows = []
        for arm, method in shown.items():
            assert arm in importlib.import_module(f"experiments.{name}").ARMS
            near, other = np.zeros((2, 4)) if arm == "base" else 0.9 * rng.random((2, 4))
            metrics = {"prior": 1 - near**2, "KL": near, "KL forward": other}
            rows.append({"arm": arm, "metrics": {k: v.tolist() for k, v in metrics.items()}})
            expected += [(method, *row) for row in zip(near, near**2)] if method else []
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": rows}))
    points = [(p["method"], p["KL"], p["loss"]) for p in forgetting_law.read(tmp_path)]
    assert [p[0] for p in points] == [e[0] for e in expected]
    assert np.allclose([p[1:] for p in points], [e[1:] for e in expected])
    forgetting_law.main([str(tmp_path)])
    rows = json.loads((tmp_path / "forgetting_law.json").read_text())["rows"]
    assert (rows[0]["arm"], rows[0]["n"]) == ("all", len(points))
    assert rows[0]["R² KL"] == pytest.approx(1) and rows[0]["R² KL forward"] < 0.5
    claims = [*report.claims_table({"forgetting_law": {"rows": rows}})]
    assert any("R² 1.00 with KL(model ‖ base)" in line and "| yes |" in line for line in claims)
    assert "| all |" in capsys.readouterr().out
    (tmp_path / "kl.json").unlink()
    with pytest.raises(SystemExit, match="no results of kl; make them: python -m experiments.kl"):
        forgetting_law.main([str(tmp_path)])


def page(body="of an earlier run\n"):
    return "".join(f"{n} is\n<!-- {n} -->\n{body}<!-- end -->\n" for n in ["claims", *report.NAMES])


def test_the_report_changes_its_parts_alone():
    """Tables of what was measured; the text around them stays, and a part left out is named."""
    changed = report.rewritten(page(), {})
    missing = len(report.NAMES) + len(report.CLAIMING)
    assert changed.count(report.MISSING) == missing and "earlier" not in changed
    assert re.sub(
        r"(<!-- \w+ -->\n).*?<!-- end -->", r"\1<!-- end -->", changed, flags=re.S
    ) == page("")
    with pytest.raises(ValueError, match="0 parts <!-- kl -->, not one"):
        report.rewritten(page().replace("<!-- kl -->", ""), {})


def test_a_sweep_shows_what_validation_chose():
    """Table and claims have each family's chosen arm, not its best one by the metric shown."""
    rates, rows = ("at 0.0002", "at 0.0006"), []
    for family, strict in {"answer only": 0.1, "article only": 0.6, "both": 0.7}.items():
        for rate, val in zip(rates, (0.5, 0.9)):
            metrics = {m: [val] * 2 for m in context.SWEEP}
            metrics["strict"] = [strict, strict + 0.001] if rate == rates[1] else [0.99] * 2
            rows.append({"arm": f"{family} {rate}", "metrics": metrics})
    results = {"context": {"rows": rows, "seeds": [0, 1], "seconds": 9}}
    table = [*report.experiment_table(results, "context")]
    assert [line.split(" | ")[0] for line in table[2:-2]] == [
        f"| {k} {rates[1]}" for k in context.TEXTS
    ]
    assert "0.10 ± 0.00 / 0.60 ± 0.00 / 0.70 ± 0.00" in "\n".join(report.claims_table(results))


def test_the_readme_is_what_the_report_writes():
    """Text and committed results cannot drift apart."""
    text, results = report.README.read_text(encoding="utf-8"), report.load(report.RESULTS)
    assert set(results) == set(report.NAMES)
    fewer = {"forgetting_law", "real_grid"}
    assert all(len(r["seeds"]) >= 3 for name, r in results.items() if name not in fewer)
    assert report.rewritten(text, results) == text


def test_the_readme_links_to_existing_files():
    """Figures, results and files that the page names are there."""
    text = report.README.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (HERE / link).exists(), link
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        assert (HERE / f"{name}.py").exists(), name


def test_committed_results_fit_the_code():
    """Every arm of the code is in the results, with a value per seed."""
    results = report.load(report.RESULTS)
    losses = lambda rows: {row["arm"]: row["loss"] for row in rows}
    law = results.pop("forgetting_law")["rows"]
    assert losses(law) == losses(forgetting_law.measure(report.RESULTS))
    for name, result in results.items():
        module = importlib.import_module(f"experiments.{name}")
        assert [row["arm"] for row in result["rows"]] == [*module.ARMS]
        for row in result["rows"]:
            seeds = 1 if row["arm"] in getattr(module, "ONCE", ()) else len(result["seeds"])
            for metric, values in row["metrics"].items():
                # Not every run gets to nine tenths of the facts.
                assert len(values) == seeds or metric.endswith(" .90") and values
