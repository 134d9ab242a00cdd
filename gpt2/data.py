"""From JSONL files to rows of token ids: the encoding, what each role reads, minibatches."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import torch

from sdft import student_context, teacher_context

# How GPT-2 splits a text into words before it merges bytes.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
FIELDS = ("prompt", "demonstration", "article", "answer", "text", "where")
ALIASES = {"privileged_context": "demonstration", "context": "article"}
TEMPLATES = {  # --teacher_reads: what the teacher reads of a row
    "article": "{article}\n\n{prompt}",
    "demonstration": teacher_context("{prompt}", "{demonstration}"),
    "both": teacher_context("{prompt}", "{demonstration}", "{article}"),
}
PLACEHOLDER = re.compile(r"\{(\w+)\}")


# --- Tokens ---------------------------------------------------------------------------------------


def load_encoding(folder):
    """GPT-2's byte-pair encoding: of vocab.json and merges.txt in the folder, else tiktoken's."""
    vocab, merges = (Path(folder or "") / name for name in ("vocab.json", "merges.txt"))
    if not (folder and vocab.is_file() and merges.is_file()):
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests has many kinds of them
            raise OSError(
                f"tiktoken cannot download GPT-2's vocabulary ({type(e).__name__}); connect to the "
                "network once, set TIKTOKEN_CACHE_DIR to a folder that has it, or put vocab.json "
                "and merges.txt beside the weights of --init_from"
            ) from None
    try:
        # tiktoken caches by path. The hashes make it read a file that has changed again.
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (merges, vocab)]
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(merges), str(vocab), *hashes)
        special = {"<|endoftext|>": json.loads(vocab.read_text(encoding="utf-8"))["<|endoftext|>"]}
        if special["<|endoftext|>"] != len(ranks):
            raise ValueError
        return tiktoken.Encoding(
            "gpt2-local", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
    except Exception:  # whatever a damaged file makes the reader raise
        raise ValueError(
            f"{vocab} and {merges} are damaged, or not in GPT-2's format with <|endoftext|> as the "
            "last token; fetch them again"
        ) from None


def to_bytes(enc, tokens):
    """Of one token, or of a response without its end token; ids beyond the encoding are 0xFF."""
    tokens = tokens[:-1] if len(tokens) > 1 and tokens[-1] == enc.eot_token else tokens
    return b"".join(
        enc.decode_single_token_bytes(t) if t < enc.n_vocab else b"\xff" for t in tokens
    )


def decode(enc, tokens):
    """Text of token ids up to the end token."""
    tokens = tokens[: tokens.index(enc.eot_token)] if enc.eot_token in tokens else tokens
    return to_bytes(enc, tokens).decode("utf-8", "replace")


# --- The teacher's template -----------------------------------------------------------------------


def read_template(path):
    """A template for the teacher's prompt from a text file, which is taken exactly as it stands."""
    try:
        template = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    names, others = set(PLACEHOLDER.findall(template)), {"demonstration", "article"}
    if "prompt" not in names or not names & others or names - others - {"prompt"}:
        raise ValueError(
            f"{path}: a template needs {{prompt}}, and {{demonstration}} or {{article}} or both, "
            "and no other placeholder"
        )
    return template


def fill_template(template, row):
    """The teacher's text. Only the default template does without an article if there is none."""
    if template == TEMPLATES["both"] and "article" not in row:
        template = TEMPLATES["demonstration"]
    return PLACEHOLDER.sub(lambda match: text_of(row, match[1]), template)


# --- Rows -----------------------------------------------------------------------------------------


def read_jsonl(path):
    """The objects of a JSONL file, which may be a pipe, each with `where` it stands. A null counts
    as absent."""
    rows = []
    for n, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        try:  # Some editors put a byte order mark before the first line.
            row = json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8"))
            if not isinstance(row, dict):
                raise TypeError(f"{type(row).__name__} in place of an object")
        except (ValueError, TypeError, RecursionError) as e:
            reason = str(e)[:80]
            raise ValueError(
                f"{where}: not JSON in UTF-8 ({reason}); write one object {{...}} a line"
            ) from None
        row = {name: value for name, value in row.items() if value is not None}
        for alias, name in ALIASES.items():
            if alias in row and name in row:
                raise ValueError(f"{where}: {name} and {alias} are the same field; remove one")
            if alias in row:
                row[name] = row.pop(alias)
        rows.append(row | {"where": where})
    if not rows:
        raise ValueError(f"{path} holds no rows; write one JSON object a line")
    return rows


def text_of(row, name):
    """A field's text, which must be there and not be empty."""
    text = row.get(name, "")
    if not isinstance(text, str) or not text.strip():
        problem = "missing, empty or no text; write it in double quotes"
        raise ValueError(f"{row['where']}: {name} is {problem}")
    return text


@dataclass
class RowReader:
    """Turns the lines of JSONL files into rows of token ids, and checks that they fit the model.

    `training`, `task` and `prior` each make a row of a line. Its `need` is the number of tokens
    that it takes in one sequence. Special tokens in a text are plain text: nobody's data ends a
    response.
    """

    enc: tiktoken.Encoding
    block_size: int
    max_new_tokens: int
    template: str = TEMPLATES["both"]
    imitates: bool = False  # SFT, which needs a demonstration whatever the teacher reads
    skip_long: bool = False
    notes: list = field(default_factory=list)  # what the user should know of the files read

    def __post_init__(self):
        longest = max(map(len, self.enc.token_byte_values()))  # in bytes
        self.enough = longest * (self.block_size + 1)  # characters: more tokens than fit

    def encode(self, text):
        """Token ids. What cannot fit is cut off, but still too long: tiktoken panics at it."""
        return self.enc.encode_ordinary(text[: self.enough])

    def training(self, line):
        """prompt and what the template and SFT need; an answer is optional."""
        row = self.task(line, answered="answer" in line)
        row["teacher_prompt"] = fill_template(self.template, line)
        row["teacher_ids"] = self.encode(row["teacher_prompt"])
        row["need"] = max(row["need"], len(row["teacher_ids"]) + self.max_new_tokens)
        row["demonstration"] = ""
        if self.imitates or "demonstration" in line:
            row["demonstration"] = text_of(line, "demonstration")
            row["demonstration_ids"] = self.encode(row["demonstration"]) + [self.enc.eot_token]
            row["glued"] = not (row["prompt"][-1].isspace() or row["demonstration"][0].isspace())
        if self.imitates:
            need = len(row["prompt_ids"]) + len(row["demonstration_ids"])
            row["need"] = max(row["need"], need)
        return row

    def task(self, line, answered=True):
        """prompt and answer, of which the student reads the prompt."""
        row = {"prompt": text_of(line, "prompt"), "where": line["where"]}
        row["answer"] = text_of(line, "answer") if answered else None
        row["prompt_ids"] = self.encode(student_context(row["prompt"]))
        return row | {"need": len(row["prompt_ids"]) + self.max_new_tokens}

    def prior(self, line):
        """text for perplexity, or prompt and answer for accuracy."""
        if "text" in line:
            # The end token stands before a text, and its last token predicts nothing.
            ids = self.encode(text_of(line, "text"))
            return {"text_ids": ids, "need": len(ids), "where": line["where"]}
        row = self.task(line)
        row["answer_ids"] = self.encode(row["answer"])
        return row | {"need": len(row["prompt_ids"]) + len(row["answer_ids"])}

    def read(self, path, make_row):
        """The rows of a file; make_row is one of the three methods above."""
        lines = read_jsonl(path)
        rows = [make_row(line) for line in lines]
        unused = [f"{k!r} ({line['where']})" for line in lines for k in line if k not in FIELDS]
        self.note(f"{path} has fields that are not used", unused)
        glued = [row["where"] for row in rows if row.get("glued")]
        self.note("prompt and demonstration meet without a space or line break", glued)
        fit = [row for row in rows if row["need"] <= self.block_size]
        too_long = [row for row in rows if row["need"] > self.block_size]
        if too_long and not (self.skip_long and fit):
            raise ValueError(
                f"{too_long[0]['where']}: context and response need {too_long[0]['need']} tokens "
                f"or more, and the model has n_positions={self.block_size}; shorten the row, lower "
                f"--max_new_tokens, or drop such rows ({len(too_long)}) with --skip_long"
            )
        what = f"dropped rows that exceed n_positions={self.block_size} (--skip_long)"
        self.note(what, [row["where"] for row in too_long])
        return fit

    def note(self, what, places):
        if places:
            self.notes.append(f"{what}, {len(places)} in all, the first at {places[0]}")


# --- Batches --------------------------------------------------------------------------------------


def minibatch(n, batch_size, step, seed):
    """Indices of the step's rows: shuffles of all n rows, one after the other, cut into batches."""
    places = range(step * batch_size, (step + 1) * batch_size)
    epochs = {place // n for place in places}
    orders = {epoch: np.random.default_rng([seed, 1, epoch]).permutation(n) for epoch in epochs}
    return [int(orders[place // n][place % n]) for place in places]


def pad_right(sequences, eos_id, device):
    """Token ids (B, C) and mask (B, C) of sequences of different lengths."""
    lengths = torch.tensor([[len(s)] for s in sequences], device=device)  # (B, 1)
    C = int(lengths.max())
    tokens = torch.tensor([s + [eos_id] * (C - len(s)) for s in sequences], device=device)
    return tokens, torch.arange(C, device=device) < lengths


def batches(pairs, size, block_size):
    """(prompts, completions) of at most `size` pairs each.

    A batch is smaller if its longest prompt and its longest completion do not fit together.
    """
    while pairs:
        n = min(size, len(pairs))
        while n > 1 and sum(max(len(pair[i]) for pair in pairs[:n]) for i in (0, 1)) > block_size:
            n -= 1
        prompts, completions = zip(*pairs[:n])
        yield prompts, completions
        pairs = pairs[n:]
