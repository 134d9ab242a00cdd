"""From JSONL files to rows of token ids: the encoding, what each role reads, minibatches."""

import hashlib
import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
import torch

from sdft import student_context, teacher_context

# How GPT-2 splits a text into words before it merges bytes.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
FIELDS = ("prompt", "demonstration", "article", "answer", "text")
ALIASES = {"privileged_context": "demonstration", "context": "article"}
TEMPLATES = {  # --teacher_reads: what the teacher reads of a row
    "article": "{article}\n\n{prompt}",
    "demonstration": teacher_context("{prompt}", "{demonstration}"),
    "both": teacher_context("{prompt}", "{demonstration}", "{article}"),
}
PLACEHOLDER = re.compile(r"\{(\w+)\}")


# --- Files ----------------------------------------------------------------------------------------


def read_bytes(path, crcs):
    """The content of a file, read once, so that it may be a pipe; crcs[path] gets its CRC-32."""
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise OSError(f"cannot read {path} ({e.strerror or e}); check the path") from None
    crcs[str(path)] = f"{zlib.crc32(content):08x}"
    return content


def check_there(path):
    """Raises as `read_bytes` does if nothing is at the path; what may be a pipe stays closed."""
    try:
        os.stat(path)
    except OSError as e:
        raise OSError(f"cannot read {path} ({e.strerror or e}); check the path") from None


def unique_keys(pairs):
    """An object_pairs_hook for json.loads, which by itself would take the last of two values."""
    [(name, times)] = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"the key {name[:40]!r} stands twice")
    return dict(pairs)


# --- Tokens ---------------------------------------------------------------------------------------


def load_encoding(folder):
    """GPT-2's byte-pair encoding: of vocab.json and merges.txt in the folder, else tiktoken's."""
    vocab, merges = (Path(folder or "") / name for name in ("vocab.json", "merges.txt"))
    if not (folder and vocab.is_file() and merges.is_file()):
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as e:  # requests has many kinds of them
            raise OSError(
                f"cannot load GPT-2's vocabulary ({type(e).__name__}): tiktoken downloads it on "
                "first use; connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that "
                "has it, or put vocab.json and merges.txt beside the weights of --init_from"
            ) from None
    try:
        # tiktoken caches by path. The hashes make it read a file that has changed again.
        hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (merges, vocab)]
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(merges), str(vocab), *hashes)
        eos = json.loads(vocab.read_text(encoding="utf-8"))["<|endoftext|>"]
    except Exception:  # whatever a damaged file makes the reader raise
        raise ValueError(
            f"{vocab} and {merges} are damaged or not in GPT-2's format; fetch them again, or "
            "delete them to use GPT-2's own"
        ) from None
    if type(eos) is not int or eos != len(ranks):
        raise ValueError(
            f"{vocab}: the number of <|endoftext|> must be the last one, {len(ranks)}; fetch it "
            "again"
        )
    special = {"<|endoftext|>": eos}
    return tiktoken.Encoding(
        "gpt2-local", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def decode(enc, tokens):
    """Text of token ids up to the end token."""
    tokens = tokens[: tokens.index(enc.eot_token)] if enc.eot_token in tokens else tokens
    parts = [enc.decode_single_token_bytes(t) if t < enc.eot_token else b"\xff" for t in tokens]
    return b"".join(parts).decode("utf-8", "replace")


# --- The teacher's template -----------------------------------------------------------------------


def read_template(path, crcs):
    """A template for the teacher's prompt from a text file, which is taken exactly as it stands."""
    try:
        template = read_bytes(path, crcs).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    names = PLACEHOLDER.findall(template)
    if unknown := [name for name in names if name not in ("prompt", "demonstration", "article")]:
        raise ValueError(
            f"{path}: unknown placeholder {{{unknown[0]}}}; use {{prompt}}, {{demonstration}} "
            "and {article}"
        )
    if "prompt" not in names or len(set(names)) == 1:
        raise ValueError(
            f"{path}: a template needs {{prompt}}, and {{demonstration}} or {{article}} or both"
        )
    return template


def fill_template(template, row):
    """The teacher's text. Only the default template does without an article if there is none."""
    if template == TEMPLATES["both"] and row.get("article") is None:
        template = TEMPLATES["demonstration"]
    return PLACEHOLDER.sub(lambda match: text_of(row, match[1]), template)


# --- Rows -----------------------------------------------------------------------------------------


def read_jsonl(path, crcs):
    """The objects of a JSONL file, with `where` each stands; and the fields that are not used."""
    rows, unused = [], []
    for n, line in enumerate(read_bytes(path, crcs).split(b"\n"), 1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        try:  # Some editors put a byte order mark before the first line.
            text = line.decode("utf-8-sig" if n == 1 else "utf-8")
            row = json.loads(text, object_pairs_hook=unique_keys)
        except UnicodeDecodeError as e:
            raise ValueError(f"{where}: byte {e.start} is not UTF-8; save the file as UTF-8")
        except (ValueError, RecursionError) as e:
            reason = str(e)[:80]
            raise ValueError(f"{where}: not JSON ({reason}); write one object a line") from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{where}: a line must be an object {{...}}, not {kind}")
        for alias, name in ALIASES.items():
            if alias in row and name in row:
                raise ValueError(f"{where}: {name} and {alias} are the same field; remove one")
            if alias in row:
                row[name] = row.pop(alias)
        unused += [f"{name!r} ({where})" for name in row if name not in FIELDS]
        rows.append(row | {"where": where})
    if not rows:
        raise ValueError(f"{path} holds no rows; write one JSON object a line")
    return rows, unused


def text_of(row, name, required=True):
    """A field's text, checked; None if an optional one is absent or null."""
    text, where = row.get(name), row["where"]
    if text is None and not required:
        return None
    if text is None:
        raise ValueError(f"{where}: {name} is missing; add it to the line")
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"{where}: {name} must be text, not {kind}; put it in double quotes")
    if not text.strip():
        raise ValueError(f"{where}: {name} is empty; fill it in or remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {name} holds half a surrogate pair, which is no character; write the whole "
            "pair or the character itself"
        ) from None
    return text


@dataclass
class RowReader:
    """Turns the lines of a JSONL file into rows of token ids, and checks that they fit the model.

    A method per kind of row returns the row and the tokens that it needs in one sequence. Special
    tokens in a text are plain text: nobody's data ends a response.
    """

    enc: tiktoken.Encoding
    block_size: int
    max_new_tokens: int
    template: str = TEMPLATES["both"]
    imitates: bool = False  # SFT, which needs a demonstration whatever the teacher reads
    skip_long: bool = False
    notes: list = field(default_factory=list)  # what the user should know of the files read
    crcs: dict = field(default_factory=dict)  # path: CRC-32, of the files read

    def __post_init__(self):
        longest = max(map(len, self.enc.token_byte_values()))  # in bytes
        self.enough = longest * (self.block_size + 1)  # characters: more tokens than fit

    def encode(self, text):
        """Token ids. What cannot fit is cut off, but still too long: tiktoken panics at it."""
        return self.enc.encode_ordinary(text[: self.enough])

    def training(self, row):
        """prompt and what the template and SFT need; an answer is optional."""
        out, need = self.task(row, answer_required=False)
        out["teacher_ids"] = self.encode(fill_template(self.template, row))
        need = max(need, len(out["teacher_ids"]) + self.max_new_tokens)
        demonstration = text_of(row, "demonstration", required=self.imitates)
        text_of(row, "article", required=False)
        if demonstration is not None:
            ids = self.encode(demonstration)
            out["demonstration_ids"] = ids + [self.enc.eot_token]  # The end is learned once.
            out["glued"] = not out["prompt"][-1].isspace() and not demonstration[0].isspace()
        if self.imitates:
            need = max(need, len(out["prompt_ids"]) + len(out["demonstration_ids"]))
        return out, need

    def task(self, row, answer_required=True):
        """prompt and answer, of which the student reads the prompt."""
        prompt = text_of(row, "prompt")
        out = {"prompt": prompt, "answer": text_of(row, "answer", required=answer_required)}
        out["prompt_ids"] = self.encode(student_context(prompt))
        return out, len(out["prompt_ids"]) + self.max_new_tokens

    def prior(self, row):
        """text for perplexity, or prompt and answer for accuracy."""
        if "text" in row:
            # The end token stands before a text, and its last token predicts nothing.
            ids = self.encode(text_of(row, "text"))
            return {"text_ids": ids}, len(ids)
        prompt, answer = self.task(row)[0]["prompt_ids"], text_of(row, "answer")
        out = {"prompt_ids": prompt, "answer_ids": self.encode(answer)}
        return out, len(prompt) + len(out["answer_ids"])

    def read(self, path, kind):
        """The rows of a file; kind is one of the methods above."""
        lines, unused = read_jsonl(path, self.crcs)
        if unused:
            self.notes.append(
                f"{path} has fields that are not used, {len(unused)} in all, first {unused[0]}"
            )
        rows, too_long, glued = [], [], []
        for line in lines:
            row, need = kind(line)
            glued += [line["where"]] if row.pop("glued", False) else []
            if need > self.block_size:
                too_long.append((line["where"], need))
            else:
                rows.append(row)
        if too_long and not self.skip_long:
            where, need = too_long[0]
            raise ValueError(
                f"{where}: context and response need {need} tokens or more, and the model has "
                f"n_positions={self.block_size}; shorten the row, lower --max_new_tokens, or drop "
                f"such rows ({len(too_long)}) with --skip_long"
            )
        if not rows:
            raise ValueError(f"{path}: no row fits n_positions={self.block_size}; shorten them")
        if too_long:
            self.notes.append(
                f"{path}: dropped {len(too_long)} of {len(lines)} rows that exceed n_positions="
                f"{self.block_size} (--skip_long)"
            )
        if glued:
            self.notes.append(
                "prompt and demonstration meet without a space or line break in "
                f"{len(glued)} rows, first at {glued[0]}"
            )
        return rows


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
