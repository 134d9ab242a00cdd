"""A GPT-2 checkpoint of toy size with a byte-level vocabulary, data and command lines for tests.

Offline, on a CPU, and on a GPU where one is. Every line of code that a real run takes is the same.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest
import tiktoken
import torch

from gpt2 import checkpoint, train
from gpt2.tokenizer import LETTERS, of_encoding
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
MERGES = ["t h", "Ġ th", "Ġth e", "i n", "a n", "Ġ 2"]  # Ġ is GPT-2's letter for a space
EOS = 262

ONE_BYTE_EACH = dict(pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)})
BYTES = tiktoken.Encoding("bytes", **ONE_BYTE_EACH, special_tokens={"<|endoftext|>": 256})
BYTES = of_encoding(BYTES)


def small_gpt(seed=0, noise=0.1, ends=0.0, **sizes):
    """A model whose every weight matters, biases and LayerNorms too; `ends` favours the end token.

    The logit of the end token, the last of the vocabulary, is higher by `ends`.
    """
    sizes = dict(block_size=320, vocab_size=263, n_layer=2, n_head=2, n_embd=32) | sizes
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**sizes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
        end = model.wte.weight[-1]
        model.ln_f.bias += ends * end / end.square().sum()
    return model


def write_vocabulary(folder):
    """GPT-2's two files with six merges: 263 tokens, the last one ends a text."""
    tokens = [*LETTERS, *(m.replace(" ", "") for m in MERGES), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]), encoding="utf-8")
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(base, data, out, *more, steps=4):
    """The command line of a run in miniature; later flags win."""
    argv = ["--init_from", base, "--data", data / "train.jsonl", "--ood", data / "ood.jsonl"]
    argv += ["--eval", data / "prior.jsonl", "--out_dir", out, "--device", "cpu"]
    argv += f"--steps {steps} --batch_size 4 --max_new_tokens 6 --lr 1e-3 --warmup 2".split()
    argv += "--log_every 1 --eval_every 2 --save_every 2 --skip_long".split()
    return [str(word) for word in [*argv, *more]]


def error_of(*argv):
    """The one sentence in which a run ends: the exit code's, or the last line of argparse."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(said):
        train.main([str(word) for word in argv])
    message = said.getvalue().splitlines()[-1] if stopped.value.code == 2 else stopped.value.code
    assert message.count("error: ") == 1 and len(message.splitlines()) == 1, message
    return message


def same(a, b, **tolerance):
    """Bit for bit, if no tolerance is named."""
    torch.testing.assert_close(a, b, **dict(rtol=0, atol=0) | tolerance)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Other numbers of threads round sums in another way, and no run repeats bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint folder with all that goes with the weights; its responses differ in length."""
    folder = tmp_path_factory.mktemp("base")
    write_vocabulary(folder)
    checkpoint.save_model(small_gpt(noise=0.2, ends=3.0), folder)
    settings = {"repetition_penalty": 1.5, "eos_token_id": 50256}  # which is no token here
    checkpoint.write_json(folder / "generation_config.json", settings)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Small training, OOD and prior sets."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(6):
        demonstration = f"It is {i} {'x' * (i % 4)}"
        rows.append({"prompt": f"What is {i}?\n", "demonstration": demonstration})
        rows[i] |= {"answer": str(i), "article": f"Article {i}."}
    del rows[1]["answer"]
    write_rows(folder / "train.jsonl", rows)
    ood = [{"prompt": prompt, "answer": "3"} for prompt in ("And 3?\n", "too long" * 50)]
    write_rows(folder / "ood.jsonl", ood)
    prior = [{"text": "The cat sat in the hat."}, {"prompt": "one, two", "answer": ", three"}]
    write_rows(folder / "prior.jsonl", prior)
    return folder
