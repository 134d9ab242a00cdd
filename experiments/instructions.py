"""Prior abilities that no one here wrote: instructions of IFEval, judged by IFEval's own checkers.

The PyPI package if-verifiable (Python 3.11) has Google's checkers and the words of the instructions
(arXiv 2311.07911), but not IFEval's prompts. Here a prompt is an everyday writing task and one of
23 instructions, with small numbers, so that 48 tokens can satisfy it: these accuracies compare
models only with each other. Upper case, lower case and language are judged with langdetect, which
is often wrong on five words or fewer. Some instructions are met by very short answers, whatever
they say, so the length of the responses belongs beside the accuracy.
"""

import importlib.util
import sys

import numpy as np

INSTALL = "pip install --no-deps if-verifiable && pip install nltk langdetect immutabledict"

# A task's last word is its topic, which some of the instructions ask for or forbid.
TASKS = """describe a lighthouse, describe a rainy day, give advice to a new cook,
describe an old bridge, explain what makes a good friend, describe a quiet library,
explain how to water a garden, describe a cat, praise a cup of tea, describe the sea,
give advice to a tired teacher, describe a busy market, invite a neighbor to a picnic,
describe a snowy mountain, explain how to ride a bicycle, thank a kind doctor, recommend a book,
explain why we need sleep, describe a walk in the forest, describe a train, describe the moon,
explain how to bake bread, describe a small village, give advice to a young musician,
describe a happy dog, explain how to paint a wall, describe breakfast, advertise a pair of shoes"""
TASKS = [f"Briefly {task.strip()}." for task in TASKS.split(",")]
# For the instruction to answer yes, no or maybe.
QUESTIONS = ["Is tea better than coffee?", "Should children learn to cook?", "Is winter beautiful?"]
QUESTIONS += ["Can a cat be a good friend?", "Is it healthy to walk every day?", "Is the sea blue?"]
WORDS = ["good", "time", "people", "often", "morning", "home", "always", "little", "color", "warm"]


def checker(instruction, kwargs):
    """IFEval's checker and the words of the instruction. ValueError if a package is missing."""
    try:
        # The package's own __init__, not run here, imports `datasets`, which checkers do not need.
        if package := importlib.util.find_spec("if_verifiable"):
            sys.modules.setdefault("if_verifiable", importlib.util.module_from_spec(package))
        import langdetect
        from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    except ImportError as e:
        raise ValueError(f"{e}; install, with Python 3.11 or later: {INSTALL}") from None
    langdetect.DetectorFactory.seed = 0  # or the same text could be judged differently each time
    judge = INSTRUCTION_DICT[instruction](instruction)
    return judge, judge.build_description(**kwargs)


def draw(task, relation, rng):
    """{instruction: its arguments}. None is left out: the package would draw it by itself."""
    words = [task.split()[-1].strip("."), str(rng.choice(WORDS))]
    few, several, many, nth = (int(rng.integers(*r)) for r in [(2, 4), (3, 9), (10, 21), (1, 3)])
    letters = {"letter": str(rng.choice([*"aeinorst"])), "let_frequency": several}
    first = {"num_paragraphs": 2, "nth_paragraph": nth, "first_word": words[1]}
    drawn = {
        "keywords:existence": {"keywords": words},
        "keywords:frequency": {"keyword": words[0], "frequency": few, "relation": relation},
        "keywords:forbidden_words": {"forbidden_words": words},
        "keywords:letter_frequency": letters | {"let_relation": relation},
        "language:response_language": {"language": str(rng.choice(["de", "es", "fr", "it"]))},
        "length_constraints:number_paragraphs": {"num_paragraphs": few},
        "length_constraints:number_words": {"num_words": many, "relation": relation},
        "length_constraints:nth_paragraph_first_word": first,
        "detectable_content:number_placeholders": {"num_placeholders": few},
        "detectable_content:postscript": {"postscript_marker": str(rng.choice(["P.S.", "P.P.S"]))},
        "detectable_format:number_bullet_lists": {"num_bullets": few},
        "detectable_format:number_highlighted_sections": {"num_highlights": few},
        "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": few},
        "combination:repeat_prompt": {"prompt_to_repeat": task},
        "startend:end_checker": {"end_phrase": "Any other questions?"},
    }
    fixed = """detectable_format:constrained_response detectable_format:json_format
    detectable_format:title combination:two_responses startend:quotation punctuation:no_comma
    change_case:english_capital change_case:english_lowercase"""
    return drawn | {instruction: {} for instruction in fixed.split()}


def prompts(seed, n=104):
    """[{"prompt", "instruction", "kwargs"}], as many for each instruction, give or take one."""
    rng = np.random.default_rng(seed)
    tasks, questions, rows = rng.permutation(TASKS), rng.permutation(QUESTIONS), []
    for i in range(n):
        task = str(tasks[i % len(tasks)])
        # An instruction returns after an odd number of rows: both relations, in turns.
        drawn = draw(task, ["less than", "at least"][i % 2], rng)
        instruction = [*drawn][i % len(drawn)]
        if instruction == "detectable_format:constrained_response":
            task = questions[i // len(drawn) % len(questions)]
        _, words = checker(instruction, kwargs := drawn[instruction])
        rows.append({"prompt": f"{task} {words}", "instruction": instruction, "kwargs": kwargs})
    return rows


def accuracy(rows, responses):
    """IFEval's strict accuracy: the response as it is. An empty one follows nothing."""
    followed = []
    for row, response in zip(rows, responses, strict=True):
        judge, _ = checker(row["instruction"], row["kwargs"])
        followed.append(bool(response.strip()) and judge.check_following(response))
    return float(np.mean(followed))
