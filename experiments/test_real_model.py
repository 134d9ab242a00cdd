"""What experiments/hf_loop.py and real_model.py guarantee, on tiny random models."""

import copy
import itertools
import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import sdft
from data import files
from experiments import common, hf_loop, instructions, real_controls, real_model, runner, tables
from experiments.real_model import Training
from model import GPT

LENGTH = "max_position_embeddings"
TEXTS = ["Who built the lighthouse?", "A bridge.", "Where?"]
HINTED = [text + " A hint." for text in TEXTS]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch, tmp_path):
    """Options as the command line sets them; no more tokens than a test needs."""
    flags = dict(dtype="float32", model=None, device="cpu", quick=False, out_dir=tmp_path)
    vars(common.options).update(flags)
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)


def save_tiny(kind, path):
    """A model of random weights and a tokenizer of bytes."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.ByT5Tokenizer(extra_ids=0)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
        "{{ 'think' if enable_thinking }}"
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, initializer_range=0.2, bos_token_id=1, eos_token_id=1)
    sizes |= dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    if kind == "llama":
        sizes |= dict(intermediate_size=64, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "gpt2")}


@pytest.fixture
def tiny(folders):
    """The tiny Llama and its tokenizer."""
    model, tokenizer = real_model.load(str(folders["llama"]))
    return copy.deepcopy(model), tokenizer


def chats(tokenizer, texts):
    return [hf_loop.chat(tokenizer, text) for text in texts]


# --- hf_loop.py ----------------------------------------------------------------------------------


REVERSE = dict(divergence="reverse", alpha=0.1, temperature=0.7, skip_tokens=1)


@pytest.mark.parametrize("given, meant", [({}, dict(divergence="forward")), (REVERSE, REVERSE)])
def test_on_a_gpt2_it_is_sdft_py(given, meant, folders):
    """In loss, rollouts and logits, whatever sampling the model's folder asks for."""
    model, tokenizer = real_model.load(str(folders["gpt2"]))
    x, xc = chats(tokenizer, TEXTS), chats(tokenizer, HINTED)
    theirs = [copy.deepcopy(model) for _ in range(2)]
    ours = [GPT.from_pretrained(folders["gpt2"]) for _ in range(2)]
    bent = dict(temperature=0.1, top_k=2, num_beams=4, repetition_penalty=5.0)
    vars(theirs[0].generation_config).update(bent)
    adamw = lambda model: torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    loss = hf_loop.sdft_step(*theirs, adamw(theirs[0]), x, xc, 1, 4, **given)
    torch.manual_seed(0)
    expected, _ = sdft.train_step(*ours, adamw(ours[0]), x, xc, 4, 1, **meant)
    assert loss == pytest.approx(expected, rel=1e-4)
    for role, temperature in itertools.product((0, 1), ([], [0], [0.7])):
        found = []
        for module, model in ((hf_loop, theirs[role]), (sdft, ours[role])):
            torch.manual_seed(0)
            y, mask = module.rollout(model, x, 12, 1, *temperature)
            found.append((y, mask, module.completion_logits(model, x, y)))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_each_end_token_of_the_model_ends_a_response(tiny):
    """As the last token with loss; what would come after it is filled up."""
    model, tokenizer = tiny
    x, seeded = chats(tokenizer, TEXTS), lambda: torch.Generator().manual_seed(1)
    free, _ = hf_loop.rollout(model, x, 12, -1, generator=seeded())  # (3, 12)
    ends = model.generation_config.eos_token_id = [free[i, 3 + i].item() for i in range(3)]
    y, mask = hf_loop.rollout(model, x, 12, hf_loop.eos_ids(model, tokenizer), generator=seeded())
    is_end = torch.isin(free, torch.tensor(ends))
    expected = (is_end.cumsum(1) - is_end.long() == 0)[:, : mask.size(1)]
    assert mask.size(1) <= 6 and torch.equal(mask, expected)
    assert torch.equal(y, torch.where(mask, free[:, : mask.size(1)], ends[0]))
    model.generation_config.eos_token_id = None
    assert hf_loop.eos_ids(model, tokenizer) == tokenizer.eos_token_id == 1


def test_a_chat_has_turns_and_arguments(tiny):
    """A demonstration can stand as what the model said before, a system turn before all."""
    _, tokenizer = tiny
    ids = hf_loop.chat(tokenizer, "Where?", "There.", "Why?", system="Rhyme.", enable_thinking=True)
    turns = "<system>Rhyme.</s><user>Where?</s><assistant>There.</s><user>Why?</s><assistant>think"
    assert tokenizer.decode(ids) == turns


def steps(student, teacher, tokenizer, n=3, **settings):
    """n steps of SDFT; the losses."""
    x, xc = chats(tokenizer, TEXTS), chats(tokenizer, HINTED)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.0)
    torch.manual_seed(0)
    args = student, teacher, optimizer, x, xc, tokenizer.eos_token_id, 4
    return [hf_loop.sdft_step(*args, **settings) for _ in range(n)]


def test_autocast_around_the_loop_loses_nothing(tiny):
    """No pass is served by casts of other weights, or (in older torch) by casts without a graph."""
    base, tokenizer = tiny
    found = []
    for cached in (True, False):
        student = copy.deepcopy(base)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            for _ in range(2):
                y, _ = hf_loop.rollout(student, [[5, 6]], 4, -1, temperature=0)
                logits = hf_loop.completion_logits(student, [[5, 6]], y)
                logits.float().logsumexp(-1).sum().backward()
                # The weights move, by an optimizer that is not sdft.py's.
                student.lm_head.weight.data.neg_()
        found.append((logits, student.lm_head.weight.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_peft_student_is_its_own_teacher(tiny):
    """Without the adapter, which alone is trained, and as a copy of the base would be."""
    peft = pytest.importorskip("peft")
    base, tokenizer = tiny
    config, found = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4), []
    for teacher in (None, copy.deepcopy(base)):
        torch.manual_seed(0)
        student = peft.get_peft_model(copy.deepcopy(base), config).eval()
        losses = steps(student, teacher, tokenizer, alpha=0.0)
        with student.disable_adapter():
            torch.testing.assert_close(*[m(torch.tensor([[5]])).logits for m in (student, base)])
        found.append((losses, peft.get_peft_model_state_dict(student)))
    torch.testing.assert_close(*found)
    assert all(w.abs().sum() > 0 for w in found[0][1].values())


REFUSED = [
    ("load with dtype=torch.float32", lambda s, t, patch: s.to(torch.bfloat16)),
    (r"differs .* call student.eval\(\)", lambda s, t, patch: s.train()),
    (r"differs .* teacher.eval\(\)", lambda s, t, patch: t.train()),
    # The longest of the teacher's prompts has 51 tokens, and 4 are to follow.
    ("need 55 positions", lambda s, t, patch: patch.setattr(s.config, LENGTH, 54)),
    ("transformers>=5", lambda s, t, patch: patch.setattr(hf_loop, "version", lambda _: "4.57")),
]


@pytest.mark.parametrize("sentence, spoil", REFUSED)
def test_what_would_train_wrongly_is_refused(sentence, spoil, tiny, monkeypatch):
    student, tokenizer = tiny
    teacher = copy.deepcopy(student)
    monkeypatch.setattr(student.config, LENGTH, 55)
    steps(copy.deepcopy(student), teacher, tokenizer, n=1)
    spoil(student, teacher, monkeypatch)
    with pytest.raises(ValueError, match=sentence):
        steps(student, teacher, tokenizer)


# --- The data, and the arms ----------------------------------------------------------------------


def test_facts_hold_their_answers_but_no_question_does():
    """And no question is in two sets: trained on as another prompt, or used to choose the rates."""
    names = "prior prior_val prior_more facts facts_val other tools tools_test instructions"
    sets = [real_model.load_rows(name) for name in names.split()]
    asked = [row["prompt"] for rows in sets for row in rows]
    prior = [row for rows in sets[:3] for row in rows]
    assert not [row for row in prior if real_model.is_correct(row["prompt"], row["answer"])]
    for fact in sets[3] + sets[4]:
        of_fact = [*fact["paraphrases"], fact["indirect"], fact["ood"]["prompt"]]
        asked += of_fact
        assert real_model.is_correct(fact["demonstration"], fact["answer"])
        for question in [fact["prompt"], *of_fact]:
            answer = (fact["ood"] if question == of_fact[-1] else fact)["answer"]
            assert real_model.is_correct(fact["article"], answer)
            assert not real_model.is_correct(question, answer)
    assert len(asked) == len(set(asked)) > 900


def test_an_answer_is_one_of_several_and_a_call_is_exact():
    right, call = real_model.is_correct, 'weather("Oslo")'
    assert right("It has 8.", "eight|8") and right("Eight", "eight|8")
    assert right(f" {call}\n", call) and not right(f"Call {call}", call)


def test_an_opening_is_counted_at_the_start_alone(tiny, monkeypatch):
    """Of an answer that tells of a text or an example, which the student does not read."""
    model, tokenizer = tiny
    texts = {"Based on the text, Velk.": True, " According to the example, 3": True, "Velk.": False}
    texts |= {"In the example it is Velk.": True, "The film is based on a book.": False}
    monkeypatch.setattr(tokenizer, "batch_decode", lambda *args, **settings: [*texts])
    rows = 5 * [{"student_ids": [3], "prompt": "", "expected": "Velk"}]
    found = real_model.answers(model, tokenizer, rows, most=1)
    assert [answer["opening"] for answer in found] == [*texts.values()]


def test_the_settings_are_those_that_the_grid_chose():
    """Most prior questions among those with nine tenths of the facts, or else most facts."""
    best = {}
    for row in tables.load(real_model.HERE / "results")["real_grid"]["rows"]:
        [new], [prior] = row["metrics"]["new"], row["metrics"]["prior"]
        score = new >= 0.9, prior if new >= 0.9 else new
        if row["family"] not in best or score > best[row["family"]][0]:
            best[row["family"]] = score, row
    families = {name: fields for name, (fields, _) in real_controls.FAMILIES.items()}
    families["sft + KL"] = real_controls.SFT_KL
    assert best.keys() == families.keys()
    for family, fields in families.items():
        assert fields.items() <= best[family][1].items(), family
    assert all(arm["split"] == "_val" for arm in real_controls.REAL_GRID.arms)


def test_an_arm_asks_and_learns_what_it_names(folders, monkeypatch):
    """The questions of its split, or "many" prior ones, those that the base knows."""
    load_rows = real_model.load_rows
    facts, facts_val, prior, prior_val, more = (
        load_rows(name)[:8] for name in "facts facts_val prior prior_val prior_more".split()
    )
    monkeypatch.setattr(real_model, "load_rows", lambda name: load_rows(name)[:8])
    monkeypatch.setattr(real_model, "is_correct", lambda response, wanted: "a" in wanted)
    monkeypatch.setattr(real_model, "scores", lambda *args: (args[2] | {"role": args[3]}, {}))
    monkeypatch.setattr(instructions, "load", list)
    common.options.model = str(folders["llama"])
    prompts = lambda rows: [row["prompt"] for row in rows]
    asked = real_model.measure(0, "a", many=True)
    known = [row for row in prior + more if "a" in row["answer"]]
    assert prompts(asked["prior"]) == prompts(known) and asked["prior questions"] == len(known) > 2
    assert asked["role"] == "student_ids"
    asked = real_model.measure(0, "a", split="_val", reads="paper")
    assert prompts(asked["new"] + asked["prior"]) == prompts(facts_val + prior_val)
    assert asked["role"] == "teacher_ids"
    # "paraphrased" trains on the first paraphrase of a fact too, and asks the second alone.
    trained = []
    monkeypatch.setattr(real_model, "train", lambda *args: trained.extend(args[3]) or {})
    asked = real_model.measure(0, "a", paraphrased=True, **real_model.SDFT)
    first, second = map(list, zip(*[fact["paraphrases"] for fact in facts]))
    assert prompts(trained) == prompts(facts) + first and prompts(asked["paraphrase"]) == second


def test_what_is_missing_is_named(monkeypatch):
    """One sentence in place of a traceback, with the command that installs it."""
    load_model = real_model.load.__wrapped__  # without its cache
    common.options.device = "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU for --device cuda"):
        load_model(None)
    common.options.device = "cpu"
    for package in ("transformers", "langdetect"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it now fails
    with pytest.raises(ValueError, match=f"transformers.*{re.escape(real_model.INSTALL)}$"):
        load_model(None)
    with pytest.raises(ValueError, match=f"langdetect.*{re.escape(instructions.INSTALL)}$"):
        instructions.load()


# --- Training ------------------------------------------------------------------------------------


def first_facts(tokenizer, n, reads="article"):
    return real_model.questions(tokenizer, real_model.load_rows("facts")[:n], [], reads=reads)


def test_what_both_roles_read(tiny):
    """The student the question alone, the teacher what is named, however the fact is asked for."""
    _, tokenizer = tiny
    [fact] = real_model.load_rows("facts")[:1]
    texts = [fact["prompt"], *fact["paraphrases"], fact["indirect"], fact["ood"]["prompt"]]
    for reads in ("article", "article and demonstration", "demonstration", "paper"):
        rows = itertools.chain(*first_facts(tokenizer, 1, reads).values())
        for text, row in zip(texts, rows, strict=True):
            student, teacher = (tokenizer.decode(row[f"{k}_ids"]) for k in ("student", "teacher"))
            assert student == f"<user>{text}</s><assistant>"
            assert text in row["teacher_prompt"] and text in teacher
            # The builder of the lighthouse stands in the article too, without a full stop.
            for what in ("article", "demonstration"):
                assert (fact[what] in teacher) == (what in reads or reads == "paper")
            assert row["demonstration"] == fact[reads if reads == "article" else "demonstration"]
            assert row["expected"] == (fact["ood"] if text == texts[-1] else fact)["answer"]


def learn(student, teacher, tokenizer, rows, training):
    return [*real_model.learn(student, teacher, tokenizer, rows, 0, training)]


def test_a_step_of_sdft_gets_the_settings(tiny, monkeypatch):
    """Six facts and two other prompts, every one before any again; the rate of the schedule."""
    model, tokenizer = tiny
    rates, prompts = [], []

    def step(student, teacher, optimizer, x, xc, *lengths, **settings):
        assert (lengths, settings) == ((1, real_model.MAX_NEW_TRAINED), asked)
        rates.append(optimizer.param_groups[0]["lr"])
        prompts.extend(map(tuple, x[:6]))
        assert [p == h for p, h in zip(x, xc)] == 6 * [False] + 2 * [True]

    monkeypatch.setattr(real_model, "sdft_step", step)
    asked = dict(divergence="jsd", alpha=0.1, temperature=0.7, skip_tokens=3)
    facts = first_facts(tokenizer, 24)["new"]
    learn(model, model, tokenizer, facts, Training("sdft", 1.0, 40, **asked))
    warmup, decay = np.arange(1, 10) / 10, np.arange(10, 0, -1) / 10
    np.testing.assert_allclose(rates, [*warmup, *np.ones(21), *decay])
    epochs = [prompts[at : at + 24] for at in range(0, 240, 24)]
    assert all(len({*epoch}) == 24 for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("method", ["own", "offline", "cpt"])
def test_an_update_by_hand(method, tiny):
    """Loss and penalty, on a response of the teacher or on the article; then embeddings and EMA."""
    student, tokenizer = tiny
    teacher, rows = copy.deepcopy(student), first_facts(tokenizer, 1)["new"]
    article = [3 + byte for byte in rows[0]["demonstration"].encode()]  # ByT5's token ids
    teacher.lm_head.weight.data.mul_(0.5)
    base, start, losses = copy.deepcopy(student), copy.deepcopy(teacher), []
    training = Training(method, 1e-2, 1, alpha=0.25, n_other=0, batch_size=1, kl_weight=0.3)
    [loss] = learn(student, teacher, tokenizer, rows, training)
    x, xc, n = [rows[0]["student_ids"]], [rows[0]["teacher_ids"]], real_model.MAX_NEW_TRAINED
    torch.manual_seed(0)
    said = [hf_loop.rollout(start, xc, n, 1, 0.5) for _ in range(real_model.N_OWN)]
    if method == "cpt":
        x, y = [article[:1]], torch.tensor([article[1:]])
        said = [(y, torch.ones_like(y))]
    for y, mask in said:
        sft = sdft.sft_loss(hf_loop.completion_logits(base, x, y), y, mask)
        distill, _ = hf_loop.distill_loss(base, start, x, xc, y, mask, "forward")
        penalty, _ = hf_loop.distill_loss(base, start, x, x, y, mask, "reverse")
        losses.append(((distill if method == "offline" else sft) + 0.3 * penalty).item())
    assert min(abs(loss - each) for each in losses) < 1e-6
    for s, t, before in zip(*(m.parameters() for m in (student, teacher, start)), strict=True):
        torch.testing.assert_close(t, 0.25 * s + 0.75 * before)
    assert torch.equal(*(m.get_input_embeddings().weight for m in (student, base)))


def test_sft_learns_answers_by_heart(tiny):
    """The expert's answer word for word, with its end; padding has no loss. And the KL, by hand."""
    base, tokenizer = tiny
    rows, student = first_facts(tokenizer, 2, "demonstration")["new"], copy.deepcopy(base)
    training, alone = Training("expert", 2e-2, 40, n_other=0, batch_size=2), []
    for row in rows:
        y = torch.tensor([row["response_ids"]])
        logits = hf_loop.completion_logits(base, [row["student_ids"]], y)
        alone.append(sdft.sft_loss(logits, y, torch.ones_like(y)).item())
    assert learn(student, base, tokenizer, rows, training)[0] == pytest.approx(np.mean(alone))
    found = real_model.kl_to_base(base, student, tokenizer, rows)
    torch.manual_seed(0)
    x = [row["student_ids"] for row in rows]
    y, mask = hf_loop.rollout(student, x, 4, 1)  # the student's own responses
    p, q = (hf_loop.completion_logits(m, x, y).log_softmax(-1) for m in (student, base))
    assert found == pytest.approx(((p.exp() * (p - q)).sum(-1) * mask).sum(1).mean().item())
    found = real_model.answers(student, tokenizer, rows, most=32)
    assert [answer["answer"] for answer in found] == [row["demonstration"] for row in rows]
    assert all(answer["right"] and answer["ended"] for answer in found)
    [cut] = real_model.answers(student, tokenizer, rows[:1], most=2)
    assert not cut["right"] and not cut["ended"]


# --- Whole runs ----------------------------------------------------------------------------------


def test_every_arm_writes_results_answers_and_looks(folders, tmp_path, monkeypatch):
    """Metrics of both tasks, the answers behind them, and a run for the page of trained arms."""
    load_rows, learn, calls = real_model.load_rows, real_model.learn, []
    monkeypatch.setattr(real_model, "learn", lambda *args: calls.append(args) or learn(*args))
    monkeypatch.setattr(real_model, "load_rows", lambda name: load_rows(name)[:2])
    monkeypatch.setattr(real_model, "is_correct", lambda response, wanted: True)
    monkeypatch.setattr(real_model, "THEN_STEPS", 1)
    monkeypatch.setattr(instructions, "load", lambda: [{"prompt": "Describe a cat."}])
    monkeypatch.setattr(instructions, "accuracy", lambda rows, responses: float(len(responses)))
    arms = [row | (dict(steps=2) if "steps" in row else {}) for row in real_model.REAL_MODEL.arms]
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # a tiny model is slower in two threads
    flags = ["--out_dir", str(tmp_path), "--model", str(folders["llama"]), "--dtype", "float32"]
    runner.main("", replace(real_model.REAL_MODEL, arms=arms), argv=flags)
    read = lambda path: json.loads((tmp_path / path).read_text(encoding="utf-8"))
    rows = read("real_model.json")["rows"]
    assert [row["arm"] for row in rows] == ["base", "oracle", "sft", "sft on own", "sdft"]
    for row in rows:
        metrics, trained, name = row["metrics"], "steps" in row, f"{row['arm']}, seed 0"
        assert {*real_model.REAL_MODEL.columns} - {"prior at .90"} <= {*metrics}
        assert all(len(v) == 1 and np.isfinite(v[0]) for v in metrics.values())
        assert trained or metrics["KL prior"] == metrics["KL new"] == [0.0]
        answers = read(f"real_model_answers/{name}.json")
        assert metrics["ended"] == [np.mean([answer["ended"] for answer in answers["prior"]])]
        assert ("then tools" in answers) == ("then tools" in metrics) == trained
        assert ("prior at .90" in metrics) == trained == ("sampled at 0.5" not in metrics)
        assert ("teacher at 2" in metrics) == (row["arm"] == "sdft")
        if trained:
            folder = tmp_path / "real_model_runs" / name
            looks, samples = (files.read(folder / f"{n}.jsonl")[0] for n in ("metrics", "samples"))
            assert [look["step"] for look in looks] == [0, 2] and looks[1]["loss"] > 0
            assert ("teacher_accuracy" in looks[0]) == (row["arm"] == "sdft")
            shown = [(s["step"], s["kind"]) for s in samples if s["role"] == "student"]
            assert shown == [(t, kind) for t in (0, 2) for kind in ("new", "new", "prior", "prior")]
            assert samples[0]["demonstration"] in samples[0]["teacher_prompt"]
    # Two facts, then two calls, whose teacher reads the question before the demonstration too.
    base, _ = real_model.load(str(folders["llama"]))
    for call, (steps, n) in zip(calls, 3 * [(2, 1), (1, 2)], strict=True):
        _, teacher, _, rows, _, training = call
        assert training.steps == steps
        assert n == 1 or teacher is not base  # but the student that begins with the calls
        assert [row["teacher_prompt"].count(row["prompt"]) for row in rows] == [n, n]


def test_looks_leave_the_training_as_it_is(tiny, monkeypatch):
    """They sample too, but not from the stream that training draws from; the base stays too."""
    base, tokenizer = tiny
    training = Training("sdft", 1e-2, 9, n_other=0, batch_size=2, alpha=0.25)
    facts, prior = (real_model.load_rows(name)[:2] for name in ("facts", "prior"))
    asked = real_model.questions(tokenizer, facts, prior, reads="article")
    alone, looked, start = (copy.deepcopy(base) for _ in range(3))
    learn(alone, copy.deepcopy(base), tokenizer, asked["new"], training)
    running = tokenizer, asked["new"], asked, 0, "a"
    real_model.train(looked, base, *running, training)
    for model, same in ((looked, alone), (base, start)):
        torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    # "prior at .90" is measured as soon as nine tenths of the facts are known.
    known = iter([0.0, 0.85, 0.9, 1.0])

    def accuracy(model, tokenizer, rows, role=None):
        return 0.5 if role == "teacher_ids" else next(known) if rows == asked["new"] else 0.7

    monkeypatch.setattr(real_model, "learn", lambda *args: iter([1.0] * 24))
    monkeypatch.setattr(real_model, "accuracy", accuracy)
    found = real_model.train(looked, base, *running, replace(training, steps=24))
    teachers = {f"teacher at {step}": 0.5 for step in (8, 16, 24)}
    assert found == teachers | {"updates to .90": 16, "prior at .90": 0.7}
