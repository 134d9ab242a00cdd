"""The page of a run shows what the files say, runs nothing of it, and works in a real browser."""

import html
import itertools
import json
import re
import shutil
import tempfile

import pytest
import torch

from data import files, watch
from experiments import page

EVIL = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'><!-- sides -->"
VOCAB = [EVIL.encode(), b"\"quotes' &amp; <b>", "שלום".encode(), b"\xe2\x82", b"\n"]
VOCAB += ["\u202eabc".encode(), "\u2028".encode(), b"<|end|>"]
SHOWN = {"\n": "↵", "\u202eabc": "\\u202eabc", "\u2028": "\\u2028"}
PROMPTS = [("a prior question", "prior"), (EVIL, "new")]
STEPS = (0, 5, 10)


def decode(ids):
    return b"".join(VOCAB[i] for i in ids).decode("utf-8", "backslashreplace")


def make_samples(skill="X"):
    """Every token of VOCAB in every response, in an order that depends on the step."""
    rows, random = [], torch.Generator().manual_seed(0)
    for phase, step, (prompt, kind) in itertools.product(("sft", "sdft"), STEPS, PROMPTS):
        about = dict(phase=phase, skill=skill, step=step, kind=kind, prompt=prompt, expected=EVIL)
        about |= dict(teacher_prompt=f"{prompt} ex<b>ample =", demonstration="ex<b>ample")
        for role in ("student", "teacher") if step == 0 else ("student",):
            tokens = torch.arange(len(VOCAB)).roll(step + len(phase + role)).tolist()
            logits = 3 * torch.randn(2, len(VOCAB), len(VOCAB), generator=random)
            about |= dict(role=role, correct=step > 0)
            rows.append(watch.sample_row(tokens, *logits, decode, "reverse", **about))
    return rows


def make_metrics():
    rows = [dict(phase="pretrain", skill=None, step=9, loss=3.0)]
    for phase, last in (("sft", 0.84), ("sdft", 0.86)):
        for skill, (step, prior) in itertools.product("XY", zip(STEPS, (0.95, 0.86, last))):
            row = dict(phase=phase, skill=skill, step=step, prior=prior, new=0.75)
            row |= dict(loss=4.0 if step else float("nan"), kl_teacher_base=0.25)
            rows.append(row | {"warnings": [EVIL] if step == 5 else []})
    return rows


def make_run(folder, lr=0.001):
    folder.mkdir()
    results = {"config": {"same": 1, "lr": lr, "evil": EVIL}, "command": f"python x.py --lr {lr}"}
    results |= {"base": {"after": "base", "X": 0.5}}
    results |= {"sdft": [{"after": "X", "X": 0.9375}, {"after": "Y", "Y": 1}]}
    (folder / "results.json").write_text(json.dumps(results))
    files.append(folder / "metrics.jsonl", make_metrics())
    files.append(folder / "samples.jsonl", make_samples())
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "a<b>")


def written(*folders):
    """The page of the runs, and the responses in it: [{arm: rows}]."""
    page.main([*map(str, folders)])
    text = (folders[0] / "page.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(data.group(1))


def found(text, section, tag):
    """The texts of all elements of a section."""
    text = text.partition(f'<section id="{section}">')[2].partition("</section>")[0]
    inner = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", text, re.S)
    return [html.unescape(re.sub(r"<[^>]*>", " ", part)).strip() for part in inner]


@pytest.fixture(scope="module")
def text(run):
    return written(run)[0]


def test_text_of_a_run_is_never_markup(run):
    """Nor is a folder's name. Nothing is loaded; no response of the student is lost or rounded."""
    text, prompts = written(run)
    assert text.count("<script") == 2 and "<img" not in text and "a<b>" not in text
    assert text.count(html.escape(EVIL)) >= 4 and not re.search("<!-- [a-z]+ -->", text)
    assert "default-src 'none'" in text and "://" not in text
    on_page = [row for arms in prompts for track in arms.values() for row in track]
    rows = [row for row in make_samples() if row["role"] == "student"]
    assert len(on_page) == len(rows) == 12
    assert all(row | {"arm": row["phase"].upper(), "run": ""} in on_page for row in rows)


def test_answers_stand_side_by_side(tmp_path):
    """Base is the answer before training, an arm's its last, the teacher's has its own prompt.

    At a later skill's start the arm is trained: the base's column stays empty. 12 looks are kept.
    """
    first, later = make_samples(), [row | {"prompt": "later"} for row in make_samples(skill="Y")]
    rows = first + later + [first[0] | {"step": step} for step in range(11, 41)]
    files.append(tmp_path / "samples.jsonl", rows)
    text, prompts = written(tmp_path)
    assert found(text, "sides", "th") == ["prompt", "expected", "base", "SFT", "SDFT", "teacher"]
    cells = found(text, "sides", "td")
    assert cells[:2] == ["a prior question (prior)", EVIL]
    base, teacher, *_, sdft = [row for row in first if row["kind"] == "prior"]
    for cell, row in zip(cells[2:6], (base, rows[-1], sdft, teacher), strict=True):
        verdict = "✓ correct" if row["correct"] else "✗ wrong"
        assert cell.startswith(row["response"].strip())
        assert cell.endswith(f"{verdict}, X, step {row['step']}")
    assert cells[12:15:2] == ["later (prior)", "–"]
    steps = [row["step"] for row in prompts[0]["SFT"]]
    assert len(steps) == 12 and steps[0] == 0 and steps[-1] == 40


def test_curves_follow_the_metrics(text):
    """Skill after skill from left to right; without pretraining, NaN and what was not measured."""
    assert found(text, "curves", "h3") == ["Loss", "New task", "Prior abilities", "KL to the base"]
    tips = found(text, "curves", "title")
    assert tips[:2] == ["SFT, loss, X, step 5: 4", "SFT, loss, X, step 10: 4"]
    lines = re.findall(r'<polyline points="([^"]*)"', text)
    assert lines[0] == "112.5,20.0 185.0,20.0 257.5,20.0 330.0,20.0"  # the highest loss
    assert lines[4] == "40.0,27.0 112.5,39.6 185.0,42.4 185.0,27.0 257.5,39.6 330.0,42.4"
    # Forgetting begins where the prior is below the first look's by more than data/watch.py's .1.
    words = "SFT: forgetting began at X, step 10 (prior 0.84)"
    assert found(text, "curves", "li") == [words, "SDFT"]
    assert re.findall(r'cx="([^"]*)" cy="([^"]*)" r="8"', text) == [("185.0", "42.4")]


def test_warnings_results_and_settings_stand_in_full(text):
    """Every warning, with its time; all scores; the command; the settings."""
    warned = re.search(r'<ul class="warn">(.*?)</ul>', text, re.S).group(1)
    assert warned.count("<li>") == 4 and f"SDFT, Y, step 5: {html.escape(EVIL)}" in warned
    cells = " ".join(found(text, "settings", "td"))
    assert cells.startswith("base 0.5 – sdft, after X 0.9375 – sdft, after Y – 1 same 1 lr 0.001")
    assert "python x.py --lr 0.001" in found(text, "settings", "div")[0]


def test_several_runs_are_overlaid(run, tmp_path):
    """Arms bear their folder's name; the settings that differ come first."""
    other = make_run(tmp_path / "b", lr=0.5)
    text, prompts = written(other, run)
    arms = [f"{arm}, {folder}" for folder in (other, run) for arm in ("SFT", "SDFT")]
    assert [*prompts[0]] == arms
    assert [li.partition(":")[0] for li in found(text, "curves", "li")] == arms
    assert found(text, "settings", "td")[18:21] == ["lr", "0.5", "0.001"]
    columns = [f"{name}, {folder}" for folder in (other, run) for name in ("base", "teacher")]
    assert {*columns} <= {*found(text, "sides", "th")}


def test_page_of_a_run_that_goes_on(tmp_path):
    """No metrics.jsonl yet, and a last line that is being written. Without either it is no run."""
    with pytest.raises(SystemExit, match="^error: .* holds no run .* name a run's --out_dir$"):
        page.main([str(tmp_path)])
    files.append(tmp_path / "samples.jsonl", make_samples())
    whole = (tmp_path / "samples.jsonl").read_bytes()
    (tmp_path / "samples.jsonl").write_bytes(whole[:-30])
    text, prompts = written(tmp_path)
    assert "no metrics.jsonl yet" in text
    assert "samples.jsonl has damaged lines, which are left out: 1." in text
    assert [len(prompts[1][arm]) for arm in ("SFT", "SDFT")] == [3, 2]


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture
def opened(run):
    """The run's page in headless Chromium; in the end there must be no error on its console."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    if not shutil.which("chromedriver"):
        pytest.skip("no browser; on Debian: apt-get install chromium chromium-driver")
    written(run)
    options = webdriver.ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in ("headless", "no-sandbox", "disable-gpu", f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as browser:
            browser.get((run / "page.html").as_uri())
            yield browser
            assert [entry["message"] for entry in browser.get_log("browser")] == []


def choose(browser, name, value):
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
    browser.execute_script(script + "e.dispatchEvent(new Event('change'))", name, value)


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return browser.execute_script(script, selector)


def shown(token):
    arrow = "" if abs(token["push"]) < 0.005 else "▲" if token["push"] > 0 else "▼"
    return SHOWN.get(token["text"], token["text"]) + arrow


def check_detail(browser, i, token):
    """Its number, reward, divergence, and the probabilities of both roles."""
    detail, cells = texts(browser, "#detail")[0], iter(texts(browser, "#detail td"))
    assert detail.startswith(f"Token {i + 1} of {len(VOCAB)}")
    numbers = re.search(r"π_S, is (\S+) nats; .* diverge by (\S+) nats", detail).groups()
    assert [*map(float, numbers)] == pytest.approx([token["reward"], token["divergence"]], 1e-3)
    table = {text.removesuffix(" (said)"): p for text, *p in zip(cells, cells, cells)}
    for column, role in enumerate(("student", "teacher")):
        for _, text, p in [*token[f"{role}_top"], (0, token["text"], token[role])]:
            percent = table[SHOWN.get(text, text)][column]
            assert p < 1e-4 or float(percent.strip("%")) == pytest.approx(100 * p, 1e-3)


def test_browser_shows_every_response(opened, run):
    """For every prompt, arm and step both prompts and the tokens, as text and in order."""
    for row in files.read(run / "samples.jsonl")[0]:
        if row["role"] == "student":
            choose(opened, "prompt", ["prior", "new"].index(row["kind"]))
            choose(opened, "arm", row["phase"].upper())
            step = STEPS.index(row["step"])
            opened.find_elements("css selector", "#track button")[step].click()
            for selector in ("#response .token", f"#track div:nth-of-type({step + 1}) .token"):
                assert texts(opened, selector) == [shown(token) for token in row["tokens"]]
            assert texts(opened, "#student-prompt") == [row["prompt"]]
            assert texts(opened, "#teacher-prompt") == [row["teacher_prompt"]]
            assert texts(opened, "#teacher-prompt mark") == [row["demonstration"]]
            verdict = "✓ correct" if row["correct"] else "✗ wrong"
            said = f"X, step {row['step']}: {verdict}, expected {EVIL}"
            assert texts(opened, "#verdict") == [said]
            # The detail opens with the token that is corrected most, and changes with the focus.
            most = max(row["tokens"], key=lambda token: token["divergence"])
            check_detail(opened, row["tokens"].index(most), most)
            tokens = opened.find_elements("css selector", "#response .token")
            opened.execute_script("arguments[0].focus()", tokens[2])
            check_detail(opened, 2, row["tokens"][2])
    assert opened.execute_script("return window.ran === undefined && !document.images.length")
