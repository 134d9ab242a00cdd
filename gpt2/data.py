"""From JSONL files to rows of token ids: what each role reads, and minibatches."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gpt2.tokenizer import Tokenizer
from sdft import student_context, teacher_context

FIELDS = ("prompt", "demonstration", "article", "answer", "text", "where")
ALIASES = {"privileged_context": "demonstration", "completion": "demonstration"}
ALIASES |= {"context": "article"}
TEMPLATES = {  # --teacher_reads: what the teacher reads of a row
    "article": "{article}\n\n{prompt}",
    "demonstration": teacher_context("{prompt}", "{demonstration}"),
    "both": teacher_context("{prompt}", "{demonstration}", "{article}"),
}
PLACEHOLDER = re.compile(r"\{(\w+)\}")


def read_template(path):
    """A template for the teacher's prompt from a text file, which is taken exactly as it stands."""
    try:
        template = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    names, others = set(PLACEHOLDER.findall(template)), {"demonstration", "article"}
    if "prompt" not in names or not names & others or names - others - {"prompt"}:
        needs = "{prompt}, and {demonstration} or {article} or both, and no other placeholder"
        raise ValueError(f"{path}: a template needs {needs}")
    return template


def read_jsonl(path):
    """The objects of a JSONL file, which may be a pipe, each with `where` it stands."""
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
            problem = f"not JSON in UTF-8 ({str(e)[:80]}); write one object {{...}} a line"
            raise ValueError(f"{where}: {problem}") from None
        row = {name: value for name, value in row.items() if value is not None}
        if "messages" in row:
            raise ValueError(f"{where}: messages are not read; write prompt and demonstration")
        for alias, name in ALIASES.items():
            if alias in row and name in row:
                raise ValueError(f"{where}: {name} and {alias} are the same field; remove one")
            row |= {name: row.pop(alias)} if alias in row else {}
        rows.append(row | {"where": where})
    if not rows:
        raise ValueError(f"{path} holds no rows; write one JSON object a line")
    return rows


def text_of(row, name):
    """A field's text, which must be there and not be empty."""
    text = row.get(name, "")
    if not isinstance(text, str) or not text.strip():
        problem = f"{name} is missing, empty or no text; write it in double quotes"
        raise ValueError(f"{row['where']}: {problem}")
    return text


@dataclass
class RowReader:
    """Turns the lines of JSONL files into rows of token ids, and checks that they fit the model.

    `training`, `task` and `prior` each make a row of a line. Its `need` is the number of tokens
    that it takes in one sequence.
    """

    tokenizer: Tokenizer
    block_size: int
    max_new_tokens: int
    template: str = TEMPLATES["both"]
    imitates: bool = False  # SFT, which needs a demonstration whatever the teacher reads
    skip_long: bool = False

    def training(self, line):
        """prompt and what the template and SFT need; an answer is optional."""
        row = self.task(line, answered="answer" in line)
        template = self.template
        if template == TEMPLATES["both"] and "article" not in line:  # no other does without it
            template = TEMPLATES["demonstration"]
        row["teacher_prompt"] = PLACEHOLDER.sub(lambda match: text_of(line, match[1]), template)
        row["teacher_ids"] = self.tokenizer.encode(row["teacher_prompt"])
        row["need"] = max(row["need"], len(row["teacher_ids"]) + self.max_new_tokens)
        row["demonstration"] = ""
        if self.imitates or "demonstration" in line:
            row["demonstration"] = text_of(line, "demonstration")
            ids = self.tokenizer.encode(row["demonstration"])
            row["demonstration_ids"] = [*ids, self.tokenizer.eos_id]
            row["glued"] = not (row["prompt"][-1].isspace() or row["demonstration"][0].isspace())
        if self.imitates:
            row["need"] = max(row["need"], len(row["prompt_ids"]) + len(row["demonstration_ids"]))
        return row

    def task(self, line, answered=True):
        """prompt and answer, of which the student reads the prompt."""
        row = {"prompt": text_of(line, "prompt"), "where": line["where"]}
        row["answer"] = text_of(line, "answer") if answered else None
        row["prompt_ids"] = self.tokenizer.encode(student_context(row["prompt"]))
        return row | {"need": len(row["prompt_ids"]) + self.max_new_tokens}

    def prior(self, line):
        """text for perplexity, or prompt and answer for accuracy."""
        if "text" not in line:
            row = self.task(line)
            # A greedy response is right with and without a space before it; so is the answer here.
            word = row["answer"].strip()
            row["answer_ids"] = [self.tokenizer.encode(word), self.tokenizer.encode(" " + word)]
            return row | {"need": len(row["prompt_ids"]) + max(map(len, row["answer_ids"]))}
        if "prompt" in line or "answer" in line:
            raise ValueError(f"{line['where']}: text beside prompt or answer; write two rows")
        # The end token stands before a text, and its last token predicts nothing.
        ids = self.tokenizer.encode(text_of(line, "text"))
        return {"text_ids": ids, "need": len(ids), "where": line["where"]}

    def read(self, path, make_row):
        """The rows of a file; make_row is one of the three methods above."""
        lines = read_jsonl(path)
        rows = [make_row(line) for line in lines]
        unused = [f"{k!r} ({line['where']})" for line in lines for k in line if k not in FIELDS]
        note(f"{path} has fields that are not used", unused)
        glued = [row["where"] for row in rows if row.get("glued")]
        note("prompt and demonstration meet without a space or line break", glued)
        fit = [row for row in rows if row["need"] <= self.block_size]
        too_long = [row for row in rows if row["need"] > self.block_size]
        if too_long and not (self.skip_long and fit):
            raise ValueError(
                f"{too_long[0]['where']}: context and response need {too_long[0]['need']} tokens, "
                f"and the model has n_positions={self.block_size}; shorten the row, lower "
                f"--max_new_tokens, or drop such rows ({len(too_long)}) with --skip_long"
            )
        what = f"dropped rows that exceed n_positions={self.block_size} (--skip_long)"
        note(what, [row["where"] for row in too_long])
        return fit


def note(what, places):
    """Prints what the user should know of a file."""
    if places:
        print(f"note: {what}, {len(places)} in all, the first at {places[0]}")


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
