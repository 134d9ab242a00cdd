"""Prior abilities that no one here wrote: instructions of IFEval, judged by IFEval's own checkers.

The PyPI package if-verifiable (Python 3.11) has Google's checkers and the words of the instructions
(arXiv 2311.07911), but not IFEval's prompts. A prompt of real_instructions.jsonl is an everyday
writing task and one of 23 instructions, all equally often, with small numbers, so that 48 tokens
can satisfy it: these accuracies compare models only with each other. Upper case, lower case and
language are judged with langdetect, which is often wrong on five words or fewer. Some instructions
are met by very short answers, whatever they say: look at the length of the responses too.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np

INSTALL = "pip install --no-deps if-verifiable && pip install nltk langdetect immutabledict"
PROMPTS = Path(__file__).with_name("real_instructions.jsonl")


def load():
    """The prompts, each with its judge: [{"prompt", "judge", ...}]"""
    try:
        # The package's own __init__, not run here, imports `datasets`, which checkers do not need.
        if package := importlib.util.find_spec("if_verifiable"):
            sys.modules.setdefault("if_verifiable", importlib.util.module_from_spec(package))
        import langdetect
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as e:
        raise ValueError(f"{e}; install, with Python 3.11 or later: {INSTALL}") from None
    langdetect.DetectorFactory.seed = 0  # or the same text could be judged differently each time
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["judge"] = INSTRUCTION_DICT[row["instruction"]](row["instruction"])
        row["judge"].build_description(**row["kwargs"])
    return rows


def accuracy(rows, responses):
    """IFEval's strict accuracy: the response as it is. An empty one follows nothing."""
    pairs = zip(rows, responses, strict=True)
    return float(np.mean([bool(y.strip()) and row["judge"].check_following(y) for row, y in pairs]))
