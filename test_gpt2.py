"""What train_gpt2.py and GPT-2's weights guarantee, one test per guarantee. CPU only, offline: python -m pytest -q test_gpt2.py

A toy-sized GPT-2 checkpoint with a byte-level vocabulary of its own stands in for the real one; every line of code is the same.
"""

import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiktoken
import torch

import model as model_file
import train_gpt2
from model import GPT, GPTConfig
from sdft import completion_logits, rollout

HERE = Path(__file__).parent
MERGES = ["t h", "Ġ th", "Ġth e", "i n", "a n", "Ġ a"]  # Ġ is GPT-2's letter for a space
SIZES = dict(block_size=320, n_layer=2, n_head=2, n_embd=32)


def write_vocabulary(folder):
    """vocab.json and merges.txt as GPT-2 has them, with six merges; returns the same as an Encoding, for comparison."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [*letters, *(m.replace(" ", "") for m in MERGES), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    ranks = {bytes(letters[c] for c in t): i for i, t in enumerate(tokens[:-1])}
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("small", pat_str=train_gpt2.PATTERN, mergeable_ranks=ranks, special_tokens=special)


def perturbed(seed=0, noise=0.2, **sizes):
    """A model whose every weight matters, biases and LayerNorms too, so that a dropped or swapped one shows."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SIZES | {"vocab_size": 263} | sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes of `start` have: on another number of threads sums are rounded otherwise, and no run repeats bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint folder with weights and vocabulary."""
    folder = tmp_path_factory.mktemp("base")
    write_vocabulary(folder)
    perturbed(noise=0.05).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small training, OOD and prior sets."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"What is {i}?\n", "demonstration": f"It is {i} {'x' * (i % 4)}", "answer": str(i)} for i in range(10)]
    rows[3]["context"] = "An article."
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "ood.jsonl", [{"prompt": "And 3?\n", "answer": "3"}])
    write_rows(folder / "prior.jsonl", [{"text": "The cat sat in the hat."}, {"text": "A man."}, {"prompt": "one, two", "answer": ", three"}])
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def flags(base, data, out, *more, steps=4):
    """The command line of a run in miniature; later flags win."""
    files = ["--init_from", base, "--data", data / "train.jsonl", "--ood", data / "ood.jsonl", "--eval", data / "prior.jsonl"]
    sizes = f"--steps {steps} --batch_size 4 --max_new_tokens 6 --lr 1e-3 --warmup 2 --log_every 1 --eval_every 2 --sample_every 2"
    return [str(f) for f in [*files, "--out_dir", out, *sizes.split(), "--save_every", 2, "--device", "cpu", *more]]


def start(*argv, **environment):
    """The command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, argv)], cwd=HERE, env=environment, **pipes)


def weights(out):
    return GPT.from_pretrained(out).state_dict()


def metrics(out, *without):
    """metrics.jsonl without what the clock wrote."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("tokens_per_s", "seconds", *without)} for r in rows]


# --- Weights --------------------------------------------------------------------------------------------------------


def test_the_openai_sizes_have_the_published_numbers_of_parameters():
    published = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
    for name, (n_layer, n_head, n_embd) in model_file.OPENAI.items():
        with torch.device("meta"):
            model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        assert sum(p.numel() for p in model.parameters()) == published[name] and model.config.vocab_size == 50257


def test_saved_weights_load_to_the_last_bit_and_train_on(tmp_path):
    model = perturbed()
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config and all(p.requires_grad for p in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    (weights_file,) = [p for p in tmp_path.iterdir() if p.name != "config.json"]
    torch.testing.assert_close(GPT.from_pretrained(weights_file).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_saved_layout_is_hugging_faces(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
    model = perturbed()
    model.save_pretrained(tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    D, names = 32, {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    for layer in range(2):
        for part in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            names |= {f"transformer.h.{layer}.{part}.{kind}" for kind in ("weight", "bias")}
    assert set(state) == names
    assert state["transformer.h.0.attn.c_attn.weight"].shape == (D, 3 * D)  # Conv1D: inputs first
    assert state["transformer.h.1.mlp.c_proj.weight"].shape == (4 * D, D)
    torch.testing.assert_close(state["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.detach().t())
    config = json.loads((tmp_path / "config.json").read_text())
    expected = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=320, vocab_size=263, n_layer=2, n_head=2)
    assert config == config | expected | dict(n_embd=32, activation_function="gelu_new", eos_token_id=262)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_prefixes_causal_masks_tied_heads_and_half_precision_are_read(prefix, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = perturbed()
    model.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    state = {k.replace("transformer.", prefix): v for k, v in torch.load(file, weights_only=True).items()}
    state |= {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 8, 8).tril().bool(), f"{prefix}h.1.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state | {"lm_head.weight": state[f"{prefix}wte.weight"]}, file)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path).state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, file)
    loaded = GPT.from_pretrained(tmp_path).state_dict()
    assert all(v.dtype == torch.float32 for v in loaded.values())
    torch.testing.assert_close(loaded, model.state_dict(), rtol=1e-3, atol=1e-3)
    torch.save(state | {"lm_head.weight": state[f"{prefix}wte.weight"] + 1}, file)
    with pytest.raises(ValueError, match="output head"):
        GPT.from_pretrained(tmp_path)


def test_logits_equal_transformers_in_both_directions(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; it is needed for this test only")
    ours, idx = perturbed(), torch.randint(263, (3, 40), generator=torch.Generator().manual_seed(0))
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(idx).logits, ours(idx), rtol=0, atol=1e-4)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "theirs")(idx), theirs(idx).logits, rtol=0, atol=1e-4)


def test_a_malicious_pickle_is_refused_and_nothing_in_it_runs(tmp_path, base, data):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    file = tmp_path / "pytorch_model.bin"
    for save in (torch.save, lambda x, f: f.write_bytes(pickle.dumps(x, protocol=2))):
        save({"wte.weight": Malicious()}, file)
        with pytest.raises(ValueError, match="nothing in it was run"):
            GPT.from_pretrained(tmp_path)
        assert not (tmp_path / "executed").exists()
    folder = tmp_path / "out" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"step": Malicious()}, folder / "new")
    (folder / "new").rename(folder / f"00000001-{train_gpt2.crc32(folder / 'new')}.pt")  # even with the right checksum
    assert "damaged" in error_of("--resume", "--out_dir", tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Malicious()))  # the bait is real
    assert (tmp_path / "executed").exists()


def test_a_missing_safetensors_is_named_with_its_pip_command(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    if (base / "model.safetensors").exists():
        with pytest.raises(ValueError, match="pip install safetensors"):
            GPT.from_pretrained(base)


def test_a_download_opens_no_pickle_unguarded_and_a_missing_network_is_said(monkeypatch):
    model = perturbed(block_size=1024, vocab_size=50257)
    monkeypatch.setattr(model_file, "OPENAI", {"gpt2": (2, 2, 32)})
    seen = {}

    def fetch(url, weights_only=False, **_):
        seen.update(url=url, weights_only=weights_only)
        return {k: v.t() if k.endswith(model_file.CONV1D) else v for k, v in model.state_dict().items()}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    torch.testing.assert_close(GPT.from_pretrained("gpt2").state_dict(), model.state_dict(), rtol=0, atol=0)
    assert seen["weights_only"] is True and seen["url"].startswith("https://huggingface.co/")

    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="cannot download gpt2 .* connect to the network"):
        GPT.from_pretrained("gpt2")


# --- Tokens ---------------------------------------------------------------------------------------------------------


def test_a_checkpoints_own_vocabulary_encodes_like_tiktoken_and_follows_its_file(tmp_path):
    oracle = write_vocabulary(tmp_path)
    enc = train_gpt2.load_encoding(tmp_path)
    for text in ("the man in the hat", "  It's 3.14\n\n\tnaïve 日本語 🙂 ", "<|endoftext|>"):
        assert enc.encode_ordinary(text) == oracle.encode_ordinary(text) and enc.decode(enc.encode_ordinary(text)) == text
    assert enc.eot_token == oracle.eot_token == 262 and len(enc.encode_ordinary(" the")) == 1
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\n")  # tiktoken keeps files by path; a changed one must be seen
    with pytest.raises(SystemExit, match="error: .*vocab.json.* damaged"):
        train_gpt2.load_encoding(tmp_path)


def test_without_network_the_vocabularys_error_names_the_cache_folder(tmp_path, monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(SystemExit, match="error: .*network.*TIKTOKEN_CACHE_DIR"):
        train_gpt2.load_encoding(tmp_path)


def test_special_tokens_in_data_are_text_and_the_end_is_trained_on_once(tmp_path, base):
    row = {"prompt": "a<|endoftext|>b\n", "demonstration": "c<|endoftext|>"}
    write_rows(tmp_path / "d.jsonl", [row])
    enc, args = train_gpt2.load_encoding(base), train_gpt2.parse_args(["--out_dir", "x", "--max_new_tokens", "4"])
    (out,) = train_gpt2.load_data(tmp_path / "d.jsonl", enc, args, 320, "train")
    assert out["demonstration_ids"].count(enc.eot_token) == 1 and out["demonstration_ids"][-1] == enc.eot_token
    assert enc.eot_token not in out["prompt_ids"] + out["teacher_ids"]
    assert enc.decode(out["prompt_ids"]) == row["prompt"] and enc.decode(out["demonstration_ids"][:-1]) == row["demonstration"]
    tokens, mask = train_gpt2.pad_right([out["demonstration_ids"], [1]], enc.eot_token, "cpu")
    assert mask.sum(1).tolist() == [len(out["demonstration_ids"]), 1]


# --- Data -----------------------------------------------------------------------------------------------------------


def test_alias_and_article_reach_the_teacher_and_never_the_student(tmp_path, base):
    write_rows(tmp_path / "d.jsonl", [{"prompt": "Q\n", "privileged_context": "DEMO", "context": "ARTICLE", "answer": None}])
    enc, args = train_gpt2.load_encoding(base), train_gpt2.parse_args(["--out_dir", "x"])
    (row,) = train_gpt2.load_data(tmp_path / "d.jsonl", enc, args, 400, "train")
    teacher = enc.decode(row["teacher_ids"])
    assert teacher.index("ARTICLE") < teacher.index("Q") < teacher.index("DEMO") and enc.decode(row["prompt_ids"]) == "Q\n"


def test_a_byte_order_mark_is_no_part_of_the_data_and_unused_fields_are_named(tmp_path, capsys):
    line = json.dumps({"prompt": "Q\n", "demonstration": "D", "anwser": "D"})
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode())
    (row,) = train_gpt2.read_jsonl(tmp_path / "d.jsonl")
    assert row["prompt"] == "Q\n" and re.search(r"'anwser' \(.*d.jsonl:1\)", capsys.readouterr().out)


def test_rows_that_are_too_long_stop_the_run_or_are_dropped_and_counted(tmp_path, base, data, capsys):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[4]["context"] = rows[7]["context"] = "long " * 100
    write_rows(tmp_path / "train.jsonl", rows)
    argv = flags(base, data, tmp_path / "out", "--data", tmp_path / "train.jsonl")
    assert re.search(r"train.jsonl:5: .* block_size is 320; .*--skip_long", error_of(*argv))
    train_gpt2.main([*argv, "--skip_long", "--steps", "1"])
    assert "dropped 2 of 10 rows" in capsys.readouterr().out


def test_every_epoch_visits_every_row_once_and_a_minibatch_depends_on_nothing_but_its_step():
    stream = [i for step in range(15) for i in train_gpt2.minibatch(10, 4, step, seed=1)]
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert train_gpt2.minibatch(10, 4, 7, seed=1) == stream[28:32] != train_gpt2.minibatch(10, 4, 7, seed=2)
    assert sorted(train_gpt2.minibatch(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]  # a batch larger than the data


def test_a_long_prompt_beside_a_long_completion_is_split_and_nothing_is_lost():
    r = random.Random(0)
    pairs = [([1] * n, [2] * r.randint(1, 20 - n)) for n in (r.randint(1, 19) for _ in range(50))]
    parts = list(train_gpt2.batches(pairs, 8, 20))
    assert [p for prompts, completions in parts for p in zip(prompts, completions)] == pairs
    assert all(len(p) <= 8 and max(map(len, p)) + max(map(len, c)) <= 20 for p, c in parts)


def test_the_shipped_data_is_valid_and_every_fact_can_be_learned_from_its_article():
    enc = tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={"<|endoftext|>": 256})
    args = train_gpt2.parse_args(["--out_dir", "x"])
    load = lambda name, kind: train_gpt2.load_data(HERE / "data" / f"{name}.jsonl", enc, args, 4096, kind)
    facts, units, prior = load("facts", "train"), load("units", "train"), load("prior", "prior")
    assert len(facts) == len(units) == 24 and sum("answer_ids" in r for r in prior) == 24 and sum("text_ids" in r for r in prior) == 8
    for row in map(json.loads, (HERE / "data" / "facts.jsonl").read_text(encoding="utf-8").splitlines()):
        assert all(train_gpt2.contains(row[k], row["answer"]) for k in ("demonstration", "context")), row
    for row in units:
        minutes, (h, m) = int(re.search(r"\d+", row["prompt"])[0]), map(int, re.findall(r"\d+", row["answer"]))
        assert minutes == 60 * h + m
    asked = {r["prompt"] for r in facts + units}
    assert not asked & {r["prompt"] for r in load("facts_ood", "task") + load("units_test", "task")}


# --- Training -------------------------------------------------------------------------------------------------------


def test_a_response_drawn_from_its_own_stream_does_not_depend_on_the_rows_beside_it():
    model, prompts = perturbed(noise=0.1), [[5, 3, 8], [7], [2, 9, 4, 11, 6]]
    stream = lambda i: torch.Generator().manual_seed(i)
    together, mask = rollout(model, prompts, 12, 262, generator=[stream(i) for i in range(3)])
    for i, prompt in enumerate(prompts):
        alone, m = rollout(model, [prompt], 12, 262, generator=[stream(i)])
        assert alone[0][m[0]].tolist() == together[i][mask[i]].tolist()


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_gradient_accumulation_equals_one_large_batch(method, tmp_path, base, data):
    for name, micro in (("whole", 4), ("parts", 1)):
        train_gpt2.main(flags(base, data, tmp_path / name, "--method", method, "--micro_batch", micro, steps=2))
    # Adam blows rounding up where a gradient is zero but for it (key biases); a wrong sum would be off by the learning rate, 1e-3
    torch.testing.assert_close(weights(tmp_path / "whole"), weights(tmp_path / "parts"), rtol=0, atol=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(weights(base).values(), weights(tmp_path / "parts").values()))


def test_bfloat16_keeps_float32_weights_and_a_gradient_for_every_one_of_them(base, data):
    student = GPT.from_pretrained(base)
    args = train_gpt2.parse_args(["--out_dir", "x", "--dtype", "bfloat16"])
    grads = []
    for dtype in ("float32", "bfloat16"):
        args.dtype = dtype
        with train_gpt2.autocast(args, torch.device("cpu")):
            y, _ = rollout(student, [[1, 2, 3]], 4, 262, generator=torch.Generator().manual_seed(0))  # first, under no_grad
            completion_logits(student, [[1, 2, 3]], torch.tensor([[4, 5, 6]])).float().logsumexp(-1).sum().backward()
        grads.append({k: p.grad.clone() for k, p in student.named_parameters()})
        student.zero_grad()
    for k, g in grads[0].items():
        assert grads[1][k].dtype == torch.float32 and grads[1][k].abs().sum() > 0
        torch.testing.assert_close(grads[1][k], g, rtol=0, atol=0.05 * g.abs().max().item())


def test_the_teacher_follows_its_flag(tmp_path, base, data):
    def weights_after(teacher):
        train_gpt2.main(flags(base, data, tmp_path / teacher, "--teacher", teacher, "--ema_alpha", 0.25, steps=1))
        saved = train_gpt2.load_checkpoint(tmp_path / teacher / "checkpoints")
        return saved["student"], saved["teacher"]

    start = weights(base)
    for name, alpha in (("ema", 0.25), ("frozen", 0.0), ("live", 1.0)):
        student, teacher = weights_after(name)
        assert not torch.equal(student["wte.weight"], start["wte.weight"])
        expected = {k: alpha * student[k].double() + (1 - alpha) * start[k].double() for k in start}
        torch.testing.assert_close({k: v.double() for k, v in teacher.items()}, expected, rtol=0, atol=1e-6)


# --- Evidence -------------------------------------------------------------------------------------------------------


def test_matches_are_by_words_and_exact_ones_forgive_case_space_and_full_stop():
    assert train_gpt2.normal(" The  River Merrow. ") == train_gpt2.normal("the river merrow")
    yes = [("It is 212 tonnes.", "212 tonnes"), ("Odo Finch!", "odo finch"), ("naïve Zoë", "zoë")]
    no = [("It is 2120 tonnes", "212"), ("songs", "song"), ("finch odo", "odo finch"), ("", "a"), ("anything", "?")]
    assert all(train_gpt2.contains(*pair) for pair in yes) and not any(train_gpt2.contains(*pair) for pair in no)


def test_prior_scores_are_those_of_a_plain_loop_over_tokens(tmp_path, base, data):
    train_gpt2.main(flags(base, data, tmp_path / "out", steps=1))
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["base"]
    model, enc, nll = GPT.from_pretrained(base), train_gpt2.load_encoding(base), []
    for text in ("The cat sat in the hat.", "A man."):
        ids = [enc.eot_token, *enc.encode_ordinary(text)]
        log_p = model(torch.tensor([ids])).log_softmax(-1)[0]
        nll += [-log_p[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    assert scores["prior_ppl"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    prompt, answer = enc.encode_ordinary("one, two"), enc.encode_ordinary(", three")
    for right in (True, False):  # the likeliest continuation of that length scores 1, any other 0
        greedy, _ = rollout(model, [prompt], len(answer), -1, temperature=0)
        row = {"prompt_ids": prompt, "answer_ids": greedy[0].tolist() if right else answer}
        run = {"enc": enc, "base": model, "sets": {"train": [], "test": [], "ood": [], "prior": [row]}}
        args = train_gpt2.parse_args(["--out_dir", "x"])
        assert train_gpt2.evaluate(model, run, args, torch.device("cpu")) == {"prior_acc": float(right)}


def test_a_run_writes_what_it_promises_and_the_next_one_starts_from_it(tmp_path, base, data, capsys):
    out = tmp_path / "a"
    train_gpt2.main(flags(base, data, out))
    printed = capsys.readouterr().out
    assert "| base |" in printed and "| sdft, 4 steps |" in printed and "s left" in printed and "truncated" in printed
    results = json.loads((out / "results.json").read_text())
    assert set(results["base"]) == set(train_gpt2.COLUMNS) | {"with_demonstration"} and results["base"]["kl_to_base"] == 0
    assert set(results["final"]) == set(train_gpt2.COLUMNS)
    assert results["final"]["kl_to_base"] > 0
    rows = metrics(out)
    assert [r["step"] for r in rows if "eval" in r] == [0, 2, 4] and [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [2] * 3 + [4] * 3
    for s in samples:
        assert len(s["tokens"]) <= 6 and all(t["kl"] >= 0 and len(t["teacher"]) == 3 for t in s["tokens"])
    assert len(train_gpt2.checkpoints(out / "checkpoints")) == 2 and not list(out.rglob("*tmp*"))

    train_gpt2.main(flags(out, data, tmp_path / "b", "--method", "sft"))  # sequential: weights and vocabulary travel
    saved = train_gpt2.load_checkpoint(tmp_path / "b" / "checkpoints")
    torch.testing.assert_close(saved["teacher"], weights(out), rtol=0, atol=0)  # the teacher starts afresh
    assert saved["optimizer"]["state"][0]["step"] == 4
    capsys.readouterr()
    train_gpt2.main(["--report", str(out), str(tmp_path / "b")])
    table = capsys.readouterr().out
    assert "sdft, 4 steps" in table and "sft, 4 steps" in table and table.count("base of") == 2


# --- Checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, data):
    """An uninterrupted run of twelve steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train_gpt2.main(flags(base, data, out, steps=12))
    return out


def wait_for_step(out, step, process):
    end = time.time() + 40
    while time.time() < end and process.poll() is None:
        if any(int(f.name[:8]) >= step for f in train_gpt2.checkpoints(out / "checkpoints")):
            return
        time.sleep(0.005)
    raise AssertionError(process.communicate())


def assert_same_run(out, whole):
    torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=0)
    assert metrics(out) == metrics(whole)
    assert (out / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_a_run_killed_twice_resumes_bit_for_bit(tmp_path, base, data, whole):
    out = tmp_path / "out"
    argv = flags(base, data, out, "--resume", steps=12)  # where there is no checkpoint, --resume starts
    for step in (0, 4):
        process = start("train_gpt2.py", *argv)
        wait_for_step(out, step, process)
        process.kill()
        process.communicate()
    train_gpt2.main(["--resume", "--out_dir", str(out), "--device", "cpu"])  # the settings come from the checkpoint
    assert_same_run(out, whole)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, base, data, whole):
    out = tmp_path / "out"
    process = start("train_gpt2.py", *flags(base, data, out, "--save_every", 100, steps=12))
    wait_for_step(out, 0, process)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=40)
    if process.returncode == 130 and "stopped after" in printed:  # a run may be quicker than the signal
        assert f"--resume --out_dir {out}" in printed and "Traceback" not in errors
        train_gpt2.main(["--resume", "--out_dir", str(out), "--device", "cpu"])
    torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=0)


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_intact(tmp_path, base, data, monkeypatch, whole):
    out, save, calls = tmp_path / "out", torch.save, []

    def full(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == 3:
            path.write_bytes(path.read_bytes()[:1000])
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    assert "free some space" in error_of(*flags(base, data, out, steps=12))
    assert [int(f.name[:8]) for f in train_gpt2.checkpoints(out / "checkpoints")] == [0, 2] and not list(out.rglob("*tmp*"))
    monkeypatch.setattr(torch, "save", save)
    train_gpt2.main(["--resume", "--out_dir", str(out), "--device", "cpu"])
    assert_same_run(out, whole)


def test_a_file_size_limit_ends_in_one_sentence(tmp_path, base, data):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        message = error_of(*flags(base, data, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message and not [p for p in (tmp_path / "out").rglob("*") if ".tmp" in p.name]


def test_resume_refuses_other_settings_and_changed_data(tmp_path, base, data, whole):
    assert "--lr 0.5 differs" in error_of("--resume", "--out_dir", whole, "--lr", "0.5")
    assert "--lr 1e-05 differs" in error_of("--resume", "--out_dir", whole, "--lr", "1e-5")  # the default is a setting as well
    assert "--resume" in error_of(*flags(base, data, whole))  # without the flag a finished run is not overwritten
    changed = tmp_path / "train.jsonl"
    changed.write_bytes((data / "train.jsonl").read_bytes())
    train_gpt2.main(flags(base, data, tmp_path / "out", "--data", changed, steps=1))
    changed.write_text(changed.read_text() + "\n")
    assert "has changed" in error_of("--resume", "--out_dir", tmp_path / "out")


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_two_processes_make_the_update_of_one(method, tmp_path, base, data):
    torchrun = "-m torch.distributed.run --nproc_per_node=2 --master_addr=127.0.0.1".split()
    argv = lambda name: flags(base, data, tmp_path / name, "--method", method, steps=3)
    process = start(*torchrun, f"--master_port={random.Random(os.getpid()).randint(20000, 40000)}", "train_gpt2.py", *argv("two"))
    train_gpt2.main(argv("one"))
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=0, atol=1e-5)
    for a, b in zip(metrics(tmp_path / "two", "eval"), metrics(tmp_path / "one", "eval"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert printed.count("| base |") == 1  # one process speaks and writes


# --- Mistakes -------------------------------------------------------------------------------------------------------


def error_of(*argv):
    """The one sentence in which a run ends; a hang, a traceback or several lines fail the test."""

    def hang(*_):
        raise AssertionError("hangs")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(20)
    try:
        with pytest.raises(SystemExit) as stopped:
            train_gpt2.main(list(map(str, argv)))
    finally:
        signal.alarm(0)
    message = str(stopped.value.code)
    assert message.startswith("error: ") and len(message.splitlines()) == 1, message
    return message


def fingerprint(folder):
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


ROW = {"prompt": "Where?\n", "demonstration": "In the hat.", "context": "The hat is grey.", "answer": "hat"}
LINE = json.dumps(ROW).encode()


def bad_lines():
    """(bytes of a line, a word of the message)."""
    r = random.Random(0)
    for _ in range(40):
        yield LINE[: r.randint(1, len(LINE) - 1)], "not JSON"
    for _ in range(20):
        at = r.randint(0, len(LINE))
        yield LINE[:at] + bytes([r.choice([0x80, 0xC0, 0xFE, 0xFF])]) + LINE[at:], "UTF-8"
    for field in ROW:
        for value in (7, 1.5, True, [], ["a"], {}, {"a": 1}):
            yield json.dumps(ROW | {field: value}).encode(), f"{field} "
        for value in ("", " ", "\n"):
            yield json.dumps(ROW | {field: value}).encode(), "empty"
        yield json.dumps(ROW | {field: "half \ud83d pair"}).encode(), "surrogate"
    for field in ("prompt", "demonstration"):
        yield json.dumps(ROW | {field: None}).encode(), "missing"
        yield json.dumps({k: v for k, v in ROW.items() if k != field}).encode(), "missing"
    for value in (b"7", b"null", b"true", b'"text"', b"[]", b"[{}]", b"NaN", b"1e999"):
        yield value, "object"
    for value in (b"{", b"}", b"{}{}", b"{'prompt': 1}", b"[" * 100_000, b"9" * 5000, b"\xef\xbb\xbf" + LINE, b"\x00"):
        yield value, "JSON"
    yield json.dumps(ROW | {"privileged_context": "twice"}).encode(), "same field"
    for field in ("prompt", "demonstration", "context"):
        yield json.dumps(ROW | {field: "long " * 200}).encode(), "block_size"


def test_every_bad_line_is_named_by_file_and_line_and_nothing_is_written(tmp_path, base, data):
    cases = list(bad_lines())
    assert len(cases) >= 120
    for line, word in cases:
        (tmp_path / "bad.jsonl").write_bytes(LINE + b"\n" + line + b"\n" + LINE)
        message = error_of(*flags(base, data, tmp_path / "out", "--data", tmp_path / "bad.jsonl"))
        assert "bad.jsonl:2: " in message and word in message, (line, message)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, line", [("--eval", b'{"text": 3}'), ("--eval", b'{"prompt": "a"}'), ("--ood", b'{"prompt": "a"}')])
def test_evaluation_sets_are_checked_as_strictly(flag, line, tmp_path, base, data):
    (tmp_path / "bad.jsonl").write_bytes(line)
    assert "bad.jsonl:1: " in error_of(*flags(base, data, tmp_path / "out", flag, tmp_path / "bad.jsonl"))


NUMBERS = "ema_alpha skip_tokens temperature max_new_tokens steps batch_size micro_batch lr warmup weight_decay clip seed log_every eval_every sample_every save_every"
FLAGS = [(f"--{name}", value) for name in NUMBERS.split() for value in ("-1", "nan", "ten", "")]
FLAGS += [("--method", "dpo"), ("--kl", "backward"), ("--teacher", "strict"), ("--dtype", "int8"), ("--no_such_flag", "1")]
FLAGS += [("--lr", "inf"), ("--lr", "1e38"), ("--temperature", "1e-40"), ("--weight_decay", "1e30"), ("--batch_size", "999999999")]


def test_every_wrong_flag_is_named_and_nothing_is_written(tmp_path, base, data, capsys):
    for flag, value in FLAGS:
        with pytest.raises(SystemExit) as stopped:
            train_gpt2.main(flags(base, data, tmp_path / "out", flag, value))
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in last and flag in last, (flag, value, last)
        assert not (tmp_path / "out").exists()
    for flag, value, word in [
        ("--data", "nowhere.jsonl", "nowhere.jsonl"), ("--data", HERE, "cannot read"), ("--init_from", "nowhere", "--init_from nowhere"),
        ("--device", "abacus", "--device abacus"), ("--out_dir", HERE / "LICENSE" / "x", "LICENSE"), ("--max_new_tokens", 400, "block_size"),
        ("--report", "nowhere", "results.json"), ("--out_dir", base, "--init_from"), ("--data", os.devnull, "no rows"),
    ]:  # fmt: skip
        assert word in error_of(*flags(base, data, tmp_path / "out", flag, value))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_and_configurations_are_named(form, tmp_path, base, data, monkeypatch):
    if form == "pytorch_model.bin":
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    else:
        pytest.importorskip("safetensors", reason="safetensors is not installed; it is optional")
    folder, r = tmp_path / "model", random.Random(1)
    perturbed().save_pretrained(folder)
    argv = flags(folder, data, tmp_path / "out")
    write_vocabulary(folder)
    good = {n: (folder / n).read_bytes() for n in (form, "config.json")}
    for _ in range(20):  # cut off anywhere
        (folder / form).write_bytes(good[form][: r.randint(0, len(good[form]) - 1)])
        assert form in error_of(*argv)
    for _ in range(10):  # bytes of the header: the weights themselves carry no checksum in either format
        at = r.randint(0, 60)
        (folder / form).write_bytes(good[form][:at] + r.randbytes(40) + good[form][at + 40 :])
        assert form in error_of(*argv) or str(folder) in error_of(*argv)
    (folder / form).write_bytes(good[form])
    config = json.loads(good["config.json"])
    changes = [{k: v} for k in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd") for v in (0, -1, "2", None, 3, 10**9, 1.5)]
    changes += [{"model_type": "llama"}, {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3}, {"n_inner": 7}]
    for change in changes:
        (folder / "config.json").write_text(json.dumps(config | change))
        assert "--init_from" in error_of(*argv), change
    for text in (b"", b"{", b"[]", b"7", b"\xff", good["config.json"][:100]):
        (folder / "config.json").write_bytes(text)
        assert "config.json" in error_of(*argv)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_any_byte_changed_or_lost_is_refused_and_the_one_before_is_offered(tmp_path, base, data, whole):
    r, out = random.Random(2), tmp_path / "out"
    train_gpt2.main(flags(base, data, out))
    older, newest = train_gpt2.checkpoints(out / "checkpoints")
    good = newest.read_bytes()
    for i in range(40):
        at = r.randrange(len(good))
        newest.write_bytes(good[:at] if i % 2 else good[:at] + bytes([good[at] ^ r.randint(1, 255)]) + good[at + 1 :])
        before = fingerprint(out)
        message = error_of("--resume", "--out_dir", out, "--device", "cpu")
        assert newest.name in message and older.name in message and fingerprint(out) == before
    newest.unlink()  # the remedy works
    final = weights(out)
    train_gpt2.main(["--resume", "--out_dir", str(out), "--device", "cpu"])
    torch.testing.assert_close(weights(out), final, rtol=0, atol=0)
    assert "--data is missing" in error_of("--resume", "--out_dir", tmp_path / "empty")


def test_a_report_of_damaged_results_names_the_folder(tmp_path, whole, capsys):
    good, r = (whole / "results.json").read_bytes(), random.Random(3)
    odd = [b"[]", b"7", b'{"base": 1, "final": 2, "config": 3}', good.replace(b'"exact": 0.0', b'"exact": "all"')]
    for content in [good[: r.randint(0, len(good) - 3)] for _ in range(20)] + odd:
        (tmp_path / "results.json").write_bytes(content)
        assert str(tmp_path) in error_of("--report", whole, tmp_path)


@pytest.mark.parametrize("method", ["sdft", "sft"])
def test_a_step_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(method, tmp_path, base, data, monkeypatch):
    monkeypatch.setattr(train_gpt2, "learning_rate", lambda args, step: 1e30 if step == 2 else 1e-3)
    message = error_of(*flags(base, data, tmp_path / "out", "--method", method))
    assert re.search(r"step 4: .*; .*checkpoints is from before it", message)
    saved = train_gpt2.load_checkpoint(tmp_path / "out" / "checkpoints")
    assert saved["step"] == 2 and all(torch.isfinite(v).all() for v in saved["student"].values())


def test_a_compiler_that_is_missing_is_said_before_training(tmp_path, base, data, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    assert "--compile does not work here (no compiler)" in error_of(*flags(base, data, tmp_path / "out", "--compile"))
