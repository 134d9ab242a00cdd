"""The page of a run shows what the files say, runs nothing of it, and works in a real browser."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_toy
from data import samples
from experiments import page
from model import GPT, GPTConfig
from sdft import completion_logits, implicit_reward, token_divergence

EVIL = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
VOCAB = [EVIL.encode(), b"\"quotes' &amp; <b>", "שלום".encode(), b"\xe2\x82", b"\xac"]
VOCAB += ["\u202eabc".encode(), b"\n", b" the", "\u2028".encode(), b"<|end|>"]
PROMPTS = [(EVIL, "new"), ("a prior question", "prior")]
STEPS = (0, 5, 10)


def decode(ids):
    return b"".join(VOCAB[i] for i in ids)


def tiny(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=24, vocab_size=len(VOCAB), n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.wte.weight.mul_(30)  # far from uniform
    return model


def scored(tokens, seed=0):
    """A response's logits (C, V) under both roles."""
    student = completion_logits(tiny(seed), [[1, 2]], torch.tensor([tokens]))[0]
    teacher = completion_logits(tiny(seed), [[1, 2, 3, 2]], torch.tensor([tokens]))[0]
    return student.detach(), teacher.detach()


def make_samples(steps=STEPS, phases=("sft", "sdft"), prompts=PROMPTS):
    """Every token of VOCAB in every response, in an order that depends on the step."""
    rows = []
    for phase, step, (prompt, kind) in (
        (a, b, c) for a in ("teacher", *phases) for b in steps for c in prompts
    ):
        tokens = np.roll(np.arange(len(VOCAB)), step // 5).tolist()
        about = dict(step=step, phase=phase, kind=kind, prompt=prompt, demonstration="ex<b>ample")
        about |= dict(teacher_prompt=f"{prompt} ex<b>ample =", correct=step > 0, expected=EVIL)
        about["role"] = "teacher" if phase == "teacher" else "student"
        if phase != "teacher" or step == 0:
            rows.append(samples.sample_row(tokens, *scored(tokens), decode, "reverse", **about))
    return rows


def make_metrics(prior=(1.0, 0.98, 0.5)):
    rows = [dict(phase="pretrain", skill=None, step=9, loss=3.0)]
    for phase in ("sft", "sdft"):
        for skill in ("X", "Y"):
            for step, accuracy in zip(STEPS, prior):
                row = dict(phase=phase, skill=skill, step=step, loss=1.25, prior=accuracy)
                row |= dict(new=0.75, kl_student_base=0.5, kl_teacher_base=0.25, teacher_entropy=1)
                rows.append(row | {"warnings": [EVIL] if step == 5 else []})
    return rows


def make_run(folder, lr=0.001, **kind):
    folder.mkdir()
    results = {"config": {"lr": lr, "evil": EVIL}, "command": f"python train_toy.py --lr {lr}"}
    results |= {"base": {"X": 0.5}, "sdft": [{"after": "X", "X": 0.9375}, {"after": "Y", "X": 0.5}]}
    (folder / "results.json").write_text(json.dumps(results))
    samples.append(folder / "metrics.jsonl", make_metrics())
    samples.append(folder / "samples.jsonl", make_samples(**kind))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "a<b>")


def written(*folders):
    """The page of the runs, and the data in it."""
    page.main([*map(str, folders)])
    text = (folders[0] / "page.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return text, json.loads(data.group(1))


def page_of(tmp_path, **files):
    """The data of the page of a run with these files' texts only."""
    for name, text in files.items():
        suffix = "json" if name == "results" else "jsonl"
        (tmp_path / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    return written(tmp_path)[1]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- samples.jsonl --------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_a_sample_has_the_numbers_of_the_method(divergence):
    """Oracle: sdft.py's divergence and reward, and autograd for -∂divergence/∂logit."""
    tokens = [0, 3, 9]
    student, teacher = scored(tokens)
    student.requires_grad_()
    nats = token_divergence(student, teacher, divergence)
    nats.sum().backward()
    reward = implicit_reward(student[None], teacher[None], torch.tensor([tokens]))[0]
    row = samples.sample_row(
        tokens, student.log_softmax(-1).detach(), teacher.log_softmax(-1), decode, divergence
    )
    for t, (i, token) in enumerate(zip(tokens, row["tokens"])):
        p, q = student[t].detach().softmax(-1), teacher[t].softmax(-1)
        expected = [p[i], q[i], nats[t].detach(), reward[t], -student.grad[t, i]]
        names = ("student", "teacher", "divergence", "reward", "push")
        assert [token[n] for n in names] == pytest.approx([*map(float, expected)], 1e-3, 1e-5)
        for name, probs in (("student_top", p), ("teacher_top", q)):
            top = probs.topk(3)
            assert [i for i, _, _ in token[name]] == top.indices.tolist()
            assert [x for _, _, x in token[name]] == pytest.approx(top.values.tolist(), 1e-3)


def test_half_characters_stand_as_bytes():
    """A byte-level token may be a part of a character; the whole response has the character."""
    row = samples.sample_row([3, 4], *scored([3, 4]), decode, "reverse")
    assert [token["text"] for token in row["tokens"]] == ["\\xe2\\x82", "\\xac"]
    assert row["response"] == "€"


@pytest.mark.parametrize("wrong", [dict(phse="sft"), dict(logits=np.nan), dict(tokens=[1])])
def test_a_wrong_sample_raises(wrong):
    """A misspelt field, numbers that JSON has not, or logits of other tokens."""
    tokens, about = wrong.pop("tokens", [1, 2]), {k: v for k, v in wrong.items() if k == "phse"}
    logits = np.full((2, 4), wrong.get("logits", 0.0))
    with pytest.raises(ValueError):
        samples.sample_row(tokens, logits, logits, lambda ids: "x", "reverse", **about)


def test_lines_are_read_as_written(tmp_path):
    """Separators, lone surrogates and a last line cut off must not damage the other lines."""
    rows = [{"text": "a\u2028b\x85c\r\nd"}, {"text": "\ud800 שלום"}, {"text": "x"}]
    samples.append(tmp_path / "s.jsonl", rows[:2])
    samples.append(tmp_path / "s.jsonl", rows[2:])
    assert samples.read(tmp_path / "s.jsonl") == (rows, 0)
    (tmp_path / "s.jsonl").write_bytes((tmp_path / "s.jsonl").read_bytes()[:-4] + b"\xe2")
    assert samples.read(tmp_path / "s.jsonl") == (rows[:2], 1)


# --- The page -------------------------------------------------------------------------------------


def test_page_has_every_token_and_number(run):
    """All of samples.jsonl stands on the page unrounded, under its prompt, arm and step."""
    data = written(run)[1]
    names = ("id", "text", "student", "teacher", "divergence", "reward", "push")
    names += ("student_top", "teacher_top")
    on_page = {
        (p["prompt"], data["arms"][row["arm"]]["label"].lower(), row["step"]): row["tokens"]
        for p in data["prompts"]
        for row in p["steps"]
    }
    rows = [r for r in samples.read(run / "samples.jsonl")[0] if r["role"] == "student"]
    assert len(on_page) == len(rows) == 12
    for row in rows:
        tokens = [[token[name] for name in names] for token in row["tokens"]]
        assert on_page[row["prompt"], row["phase"], row["step"]] == tokens


def test_text_of_a_run_is_never_markup(run):
    """Prompts, tokens, settings, warnings and the folder's name may hold HTML."""
    text, data = written(run)
    assert text.count("<script") == 2 and "<img" not in text and "a<b>" not in text
    assert data["runs"][0]["config"]["evil"] == EVIL == data["runs"][0]["warnings"][0][1]


def test_page_needs_no_network(run):
    """Nothing is loaded: no address but the SVG namespace, which is a name."""
    text = written(run)[0]
    assert re.findall(r"\w+://[^\"' ]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\bsrc=(?!x )|@import|url\(", text.split("<script")[0])
    assert len(text) < 1e6


def test_answers_stand_side_by_side(run):
    """Base is the answer before training, an arm's its last, the teacher's has its own prompt."""
    sides = written(run)[1]["prompts"][0]["sides"]
    responses = {
        (r["phase"], r["step"]): r["response"] for r in samples.read(run / "samples.jsonl")[0]
    }
    first, last = responses["sft", 0], responses["sft", 10]
    assert [side[:2] for side in sides] == [
        ["base", first],
        ["SFT", last],
        ["SDFT", responses["sdft", 10]],
        ["teacher", first],
    ]
    assert [side[2:] for side in sides][:2] == [[False, "step 0"], [True, "step 10"]]


def test_a_later_skills_start_is_not_the_base(tmp_path):
    """By then the arm has been trained: the base's column stays empty."""
    folder = make_run(tmp_path / "run")
    rows = samples.read(folder / "samples.jsonl")[0]
    later = [row | {"skill": "Y", "prompt": "later"} for row in rows if row["role"] == "student"]
    samples.append(folder / "samples.jsonl", later)
    prompts = {p["prompt"]: p["sides"] for p in written(folder)[1]["prompts"]}
    assert [side[0] for side in prompts["later"]] == ["SFT", "SDFT"]
    assert prompts[PROMPTS[0][0]][0][0] == "base"


def test_curves_follow_the_metrics(run):
    """Skill after skill; pretraining, which the arms share, is left out."""
    arms = written(run)[1]["arms"]
    assert [arm["label"] for arm in arms] == ["SFT", "SDFT"]
    assert arms[0]["stages"] == [["X", 10], ["Y", 10]]
    prior = [(0, 0, 1), (0, 5, 0.98), (0, 10, 0.5), (1, 0, 1), (1, 5, 0.98), (1, 10, 0.5)]
    assert [*map(tuple, arms[0]["points"]["prior"])] == prior
    assert "student_entropy" not in arms[0]["points"]
    assert arms[0]["forgetting"]["point"] == [0, 10, 0.5]


@pytest.mark.parametrize(
    "prior, words",
    [
        (
            (1, 0.9, 0.5),
            "SFT forgets: its prior accuracy is 1.00 at X, step 0 and 0.90 at X, step 5",
        ),
        (
            (0.9, 0.88, 0.86),
            "SFT does not forget: its prior accuracy is 0.90 at X, step 0 and never",
        ),
    ],
)
def test_page_tells_when_forgetting_began(tmp_path, prior, words):
    """The first evaluation that is more than 0.05 below the first one."""
    data = page_of(tmp_path, metrics=lines(make_metrics(prior)))
    assert words in data["arms"][0]["forgetting"]["text"]


def test_base_row_opens_every_curve(tmp_path):
    """A row of phase "base" stands for all arms at step 0."""
    rows = [{"phase": "base", "step": 0, "prior": 0.99}, {"phase": "sft", "skill": "X", "step": 40}]
    rows[1] |= {"new": 0.5, "prior": 0.25, "loss": float("nan")}
    (arm,) = page_of(tmp_path, metrics=lines(rows))["arms"]
    assert arm["points"] == {"new": [[0, 40, 0.5]], "prior": [[0, 0, 0.99], [0, 40, 0.25]]}


def test_runs_are_told_apart_by_their_settings(run, tmp_path):
    """A legend by what differs; by folder if nothing does."""
    other, same = make_run(tmp_path / "b", lr=0.5), make_run(tmp_path / "c")
    labels = [arm["label"] for arm in written(run, other)[1]["arms"]]
    assert labels == ["SFT, lr 0.001", "SDFT, lr 0.001", "SFT, lr 0.5", "SDFT, lr 0.5"]
    assert written(run, same)[1]["arms"][3]["label"] == f"SDFT, {same}"


# --- Bad input ------------------------------------------------------------------------------------


def test_page_of_a_run_still_going_on(tmp_path):
    """No results.json yet, and a last line that is being written."""
    text = lines(make_samples())
    data = page_of(tmp_path, samples=text[:-30])
    notes = " ".join(data["runs"][0]["notes"])
    assert "no results.json: the run goes on" in notes and "no metrics.jsonl" in notes
    assert "1 line cut off or damaged" in notes
    assert sum(len(p["steps"]) for p in data["prompts"]) == 11


@pytest.mark.parametrize(
    "damage",
    [
        "[]",
        "7",
        "{}",
        "[" * 9999,
        '{"tokens": 5}',
        "\x00\ufffd",
        "no tokens",
        "text",
        "nan",
        "tops",
    ],
)
def test_damaged_samples_are_counted_and_left_out(tmp_path, damage):
    """Not JSON, not an object, or not of the documented shape."""
    good = make_samples(steps=(0,))[-1]
    bad = json.loads(json.dumps(good))
    if damage == "no tokens":
        del bad["tokens"]
    elif damage == "text":
        bad["tokens"][0]["student"] = "0.5"
    elif damage == "nan":
        bad["tokens"][0]["divergence"] = float("nan")
    elif damage == "tops":
        bad["tokens"][0]["teacher_top"] = [[1, "a"]]
    else:
        bad = None
    line = json.dumps(bad) if bad else damage
    data = page_of(tmp_path, samples=f"{json.dumps(good)}\n{line}\n")
    assert "Of samples.jsonl, 1 line" in " ".join(data["runs"][0]["notes"])
    assert len(data["prompts"][0]["steps"]) == 1


def test_damaged_results_and_metrics_leave_a_page(tmp_path):
    """Settings and curves are then missing, and the page says so."""
    metrics = lines(
        [{"step": "x"}, {"step": 1, "warnings": 5, "new": [1], "prior": True, "skill": {}}]
    )
    data = page_of(tmp_path, metrics=metrics + "{", results='{"config": [1, ', samples="")
    assert "results.json cannot be read" in " ".join(data["runs"][0]["notes"])
    assert data["prompts"] == [] and not data["arms"][0]["points"]


def test_thousands_of_samples_make_a_small_page(tmp_path):
    """A cap with a note; first and last step and both kinds of prompt stay."""
    row = make_samples(steps=(0,))[-1]
    row["tokens"] = row["tokens"][1:4] * 2
    rows = [
        row | {"step": step, "prompt": f"question {i}", "kind": "new" if i % 2 else "prior"}
        for step in range(50)
        for i in range(40)
    ]
    data = page_of(tmp_path, samples=lines(rows))
    assert (tmp_path / "page.html").stat().st_size < 1e6
    assert "Of 2,000 responses to 40 prompts the page has" in data["note"]
    assert {p["kind"] for p in data["prompts"]} == {"new", "prior"}
    for prompt in data["prompts"]:
        assert [prompt["steps"][i]["step"] for i in (0, -1)] == [0, 49]


def test_what_is_no_run_is_one_sentence(tmp_path, run, capsys):
    """A folder without a run, no folder, or a page that cannot be written."""
    for words in ([tmp_path], [tmp_path / "none"], [run, "--out", tmp_path / "none" / "p.html"]):
        with pytest.raises(SystemExit) as error:
            page.main([*map(str, words)])
        assert re.fullmatch(r"error: .*(no run|No such file).*; [^\n]*", str(error.value))


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium by its driver; a test skips if there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync "
    flags += "disable-background-networking disable-component-update window-size=1200,1000"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in [*flags.split(), f"user-data-dir={profile}"]:
            options.add_argument(f"--{flag}")
        service = webdriver.ChromeService(executable_path=driver)
        browser = webdriver.Chrome(options=options, service=service)
        yield browser
        browser.quit()


@pytest.fixture
def opened(browser, run):
    """The run's page in the browser; at the end of the test there must be no console error."""
    written(run)
    browser.get((run / "page.html").as_uri())
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def set_value(browser, name, value):
    """Choose in a select or move a slider, as a user's input does."""
    events = "e.value = arguments[1]; for (const n of ['input', 'change'])"
    events += "e.dispatchEvent(new Event(n, {bubbles: true}))"
    browser.execute_script(
        f"const e = document.getElementById(arguments[0]); {events}", name, str(value)
    )


def texts(browser, selector, attribute="textContent"):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => arguments[1] in e ? "
    script += "e[arguments[1]] : e.getAttribute(arguments[1]))"
    return browser.execute_script(script, selector, attribute)


def test_browser_shows_every_token(opened, run):
    """For every prompt, arm and step the response's tokens, in order."""
    for row in samples.read(run / "samples.jsonl")[0]:
        if row["role"] == "student":
            set_value(opened, "prompt", [prompt for prompt, _ in PROMPTS].index(row["prompt"]))
            set_value(opened, "arm", ["sft", "sdft"].index(row["phase"]))
            set_value(opened, "step", STEPS.index(row["step"]))
            tokens = [token["text"] for token in row["tokens"]]
            assert texts(opened, "#response .token", "data-text") == tokens
            assert texts(opened, "#student-prompt") == [row["prompt"]]
            assert texts(opened, "#teacher-prompt") == [row["teacher_prompt"]]
            assert texts(opened, "#teacher-prompt mark") == [row["demonstration"]]


def test_browser_runs_nothing_of_the_text(opened):
    """Markup, quotes, right-to-left text and half a character are shown as text."""
    assert opened.execute_script(
        "return window.ran === undefined && !document.querySelector('img')"
    )
    shown = "".join(texts(opened, "#response .token"))
    for text in (EVIL, VOCAB[1].decode(), "שלום", "\\xe2\\x82", "\\u202eabc", "↵", "\\u2028"):
        assert text in shown
    assert EVIL in texts(opened, "main")[0] and "a<b>" in texts(opened, "h1")[0]


def test_slider_changes_the_response(opened):
    """Before, during and after training, by the keyboard too."""
    seen = []
    opened.find_element("id", "step").send_keys("\ue011")  # Home
    for _ in STEPS:
        seen.append("".join(texts(opened, "#response .token")))
        opened.find_element("id", "step").send_keys("\ue014")  # right arrow
    assert len(set(seen)) == len(STEPS)
    assert texts(opened, "#step", "aria-valuetext") == ["step 10 (the last one)"]


def test_pointer_and_keys_change_the_detail(opened, run):
    """The detail is of the token under the pointer, or of that which has the focus."""
    from selenium.webdriver import ActionChains, Keys

    set_value(opened, "step", 0)
    tokens = opened.find_elements("css selector", "#response .token")
    ActionChains(opened).move_to_element(tokens[1]).perform()
    assert texts(opened, "#detail")[0].startswith("Token 2 of 10: “\"quotes' &amp; <b>”")
    tokens[1].send_keys(Keys.ARROW_RIGHT)
    detail = texts(opened, "#detail")[0]
    assert detail.startswith("Token 3 of 10: “שלום”")
    token = samples.read(run / "samples.jsonl")[0][-6]["tokens"][2]
    assert f"= {token['reward']:.4g}" in detail
    opened.switch_to.active_element.send_keys(Keys.END)
    assert texts(opened, "#detail")[0].startswith("Token 10 of 10")
    opened.switch_to.active_element.send_keys(Keys.TAB)
    assert "token" not in opened.switch_to.active_element.get_attribute("class")


def test_focus_follows_tab_into_the_response(opened):
    """Tab alone reaches the tokens after the slider."""
    from selenium.webdriver import Keys

    opened.find_element("id", "step").send_keys(Keys.TAB)
    while opened.switch_to.active_element.get_attribute("class") == "text":
        opened.switch_to.active_element.send_keys(Keys.TAB)  # a text that scrolls
    label = opened.switch_to.active_element.get_attribute("aria-label")
    assert re.match(r"token \d+ of 10: .*; divergence .* nats; student .*%, teacher .*%", label)


@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_its_window(opened, width):
    """A phone's width: nothing but tables scrolls sideways."""
    size = dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wide = opened.execute_script("return document.documentElement.scrollWidth")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= width


def test_pages_of_parts_and_of_several_runs(browser, run, tmp_path):
    """No console error without samples, without curves, or with another run beside it."""
    only = {"metrics": lines(make_metrics()), "samples": lines(make_samples())}
    folders = [tmp_path / name for name in only]
    for folder, (name, text) in zip(folders, only.items()):
        folder.mkdir()
        page_of(folder, **{name: text})
    both = make_run(tmp_path / "b", lr=0.5)
    written(both, run, *folders)
    for folder in (*folders, both):
        browser.get((folder / "page.html").as_uri())
        assert browser.get_log("browser") == []
        assert browser.execute_script("return document.querySelectorAll('section').length") >= 2
    assert len(texts(browser, ".legend li")) == 6


# --- Runs of the trainers, in a browser -----------------------------------------------------------


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """train_toy.py in miniature."""
    out = tmp_path_factory.mktemp("toy") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_toy, "TEACHER_GATE", 0)
        patch.setattr(train_toy, "MODEL", train_toy.MODEL | {"n_layer": 1, "n_embd": 16})
        train_toy.main(f"--pretrain_steps 9 --steps 3 --sft_steps 3 --out_dir {out}".split())
    return out


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory):
    """python -m gpt2.train on random weights, whose tokens are bytes: half characters abound."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT(GPTConfig(512, 257, 1, 2, 16)).save_pretrained(folder / "base")
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    vocab = {letter: i for i, letter in enumerate([*letters, "<|endoftext|>"])}
    (folder / "base" / "vocab.json").write_text(json.dumps(vocab))
    (folder / "base" / "merges.txt").write_text("#version: 0.2\n")
    rows = [{"prompt": f"{EVIL} {i}\n", "demonstration": EVIL, "answer": "x"} for i in range(4)]
    samples.append(folder / "data.jsonl", rows)
    samples.append(folder / "prior.jsonl", [{"prompt": "\u05e9\u05dc", "answer": "\u202e"}])
    words = (
        "--steps 4 --eval_every 2 --batch_size 2 --max_new_tokens 8 --device cpu --init_from base"
    )
    words += " --data data.jsonl --eval prior.jsonl --out_dir out"
    command = [sys.executable, "-m", "gpt2.train", *words.split()]
    path = {"PYTHONPATH": str(Path(page.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=path, check=True, capture_output=True)
    return folder / "out"


@pytest.mark.parametrize("trainer", ["toy_run", "gpt2_run"])
def test_page_of_a_real_run_works_in_a_browser(trainer, browser, request):
    """Every token of its samples; pointer, keys and slider change what is shown; no error."""
    from selenium.webdriver import ActionChains, Keys

    out = request.getfixturevalue(trainer)
    data, tracks = written(out)[1], {}
    for row in samples.read(out / "samples.jsonl")[0]:
        if row["role"] == "student":
            tracks.setdefault((row["prompt"], row["phase"].upper()), []).append(row)
    assert not data["note"] and not data["runs"][0]["notes"]  # nothing is left out
    assert {"kl_teacher_base", "never_ended", "new", "prior"} <= {*data["arms"][-1]["points"]}
    browser.get((out / "page.html").as_uri())
    for i, prompt in enumerate(data["prompts"]):
        set_value(browser, "prompt", i)
        for arm in {row["arm"] for row in prompt["steps"]}:
            set_value(browser, "arm", arm)
            rows = tracks.pop((prompt["prompt"], data["arms"][arm]["label"]))
            for step, row in enumerate(rows):
                set_value(browser, "step", step)
                tokens = [token["text"] for token in row["tokens"]]
                assert texts(browser, "#response .token", "data-text") == tokens
            assert texts(browser, "#teacher-prompt mark") == [row["demonstration"]] * (
                row["demonstration"] != ""
            )
    assert tracks == {}
    set_value(browser, "step", 0)
    before = texts(browser, "#step", "aria-valuetext")
    browser.find_element("id", "step").send_keys(Keys.ARROW_RIGHT)
    assert "before training" in before[0] and texts(browser, "#step", "aria-valuetext") != before
    last = browser.find_elements("css selector", "#response .token")[-1]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", last)
    ActionChains(browser).move_to_element(last).perform()
    count = len(texts(browser, "#response .token"))
    assert texts(browser, "#detail")[0].startswith(f"Token {count} of {count}")
    last.send_keys(Keys.HOME)
    assert texts(browser, "#detail")[0].startswith(f"Token 1 of {count}")
    assert browser.execute_script("return window.ran === undefined")
    assert [entry["message"] for entry in browser.get_log("browser")] == []
