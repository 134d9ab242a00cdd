"""Look at the models during training: is it in trouble, and in which?

Every look has the same prompts and the same random numbers, so that what differs between two looks
is the models. It gives rows of samples.jsonl (see samples.py) and these keys of metrics.jsonl, the
same from every trainer, on prompts of the new task:

    rollouts_correct  share of the student's responses, sampled as in training, that are correct
    never_ended       share of these responses that were cut off without an end token
    response_length   their mean length in tokens, the end token included
    student_entropy, teacher_entropy  of the next token, in nats, mean over their tokens
    kl_student_base   KL(student ‖ base), in nats per token of these responses
    teacher_accuracy  share of the teacher's greedy responses, with its demonstration, that are
                      correct
    kl_teacher_base   KL(teacher ‖ base), in nats per token of the teacher's responses; the base
                      reads the prompt alone

SFT has no teacher, and none of the teacher's keys; its samples are judged by the base with the
demonstration before it. The trainers add `new` and `prior`, the greedy accuracy on the new task and
on prior abilities, and `warnings`, the sentences of the function of that name.
"""

import math

import numpy as np

from data.samples import log_softmax, sample_row

# The bounds of `warnings`. None is the paper's.
TEACHER_GOOD = 0.5  # a teacher that is wrong more often than right pulls away from the answer
TEACHER_FALL = 0.2  # more than chance, also on a few dozen prompts
COLD_START = 0.02  # one correct rollout of fifty: most updates see none
NEVER_ENDED = 0.2  # so many responses have no end to learn from
FORGETTING = 0.1  # lost prior accuracy
STEP = 0.1  # a warning comes again if it is worse by so much

N_SAMPLES = 3  # responses that are kept, of new and of prior prompts
TEXTS = ("kind", "prompt", "teacher_prompt", "demonstration", "expected")


def look(models, rows, respond, score, is_correct, decode, eos_id, divergence, n=64, **about):
    """Metrics of the new rows, and samples: the first three responses to new and to prior ones.

    models      student, teacher (None if there is none) and base
    rows        dicts of kind, prompt, teacher_prompt, demonstration and expected, all text as in
                samples.py, and of the token ids that each role reads: student_ids and teacher_ids
    respond     (model, prompts, greedy) to token ids (B, C) and their mask (B, C)
    score       (model, prompts, token ids) to logits (B, C, V), a numpy array
    is_correct  (token ids of a response, row) to a truth value, for rows with an expected answer
    decode      as of `sample_row`
    n           rows at a time
    about       phase, skill and step, for the samples
    """
    student, teacher, base = models
    judge = base if teacher is None else teacher
    metrics, samples = {}, []
    for role, model in (("student", student), ("teacher", judge)):
        if role == "teacher" and teacher is None and about["step"]:
            continue  # The base does not change, and is shown before training.
        for batch in (rows[at : at + n] for at in range(0, len(rows), n)):
            reads, hints = ([row[key] for row in batch] for key in ("student_ids", "teacher_ids"))
            y, mask = respond(model, reads if role == "student" else hints, role == "teacher")
            scores = score(student, reads, y), score(judge, hints, y), score(base, reads, y)
            for row, ids, length, *logits in zip(batch, y.tolist(), mask.sum(1).tolist(), *scores):
                ids, log_probs = ids[:length], [log_softmax(x[:length]) for x in logits]
                correct = None if row["expected"] is None else bool(is_correct(ids, row))
                if row["kind"] == "new" and (role == "student" or teacher is not None):
                    found = of_response(role, ids, correct, eos_id, *log_probs)
                    for name, values in found.items():
                        metrics.setdefault(name, []).extend(values)
                alike = [s for s in samples if (s["role"], s["kind"]) == (role, row["kind"])]
                if len(alike) < N_SAMPLES and (role == "student" or not about["step"]):
                    text = {name: row[name] for name in TEXTS} | about
                    text |= {"role": role, "correct": correct}
                    samples.append(sample_row(ids, *log_probs[:2], decode, divergence, **text))
    if teacher is None:
        metrics.pop("teacher_entropy", None)
    return {name: float(np.mean(values)) for name, values in metrics.items() if values}, samples


def of_response(role, ids, correct, eos_id, log_p, log_q, log_b):
    """{metric: values, of the response or of all its C tokens}.

    log_p, log_q, log_b (C, V) are the student's, the teacher's and the base's log-probabilities.
    """
    right = [] if correct is None else [correct]
    if role == "teacher":
        return {"teacher_accuracy": right, "kl_teacher_base": kl(log_q, log_b)}
    about = {"rollouts_correct": right, "never_ended": [ids[-1] != eos_id]}
    about |= {"response_length": [len(ids)], "kl_student_base": kl(log_p, log_b)}
    return about | {"student_entropy": entropy(log_p), "teacher_entropy": entropy(log_q)}


def entropy(log_p):
    """Of the next token, in nats, (C, V) to (C,)."""
    return -(np.exp(log_p) * log_p).sum(-1)


def kl(log_p, log_q):
    """KL(p ‖ q) of the next token, in nats, (C, V) twice to (C,)."""
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def warnings(rows):
    """The sentences on the last of an arm's rows of metrics, which begin with its first look.

    A bound is told of when it is crossed, and again whenever it is exceeded by another STEP.
    """
    best, told, sentences = (
        {},
        {},
        [],
    )  # the last of the best rows; {trouble: steps beyond the bound}
    for row in rows:
        sentences = []
        for name, excess, sentence in troubles(row, best):
            steps = math.ceil(excess / STEP - 1e-6)
            if steps > told.get(name, 0):
                told[name] = steps
                sentences.append(sentence)
        for key in ("teacher_accuracy", "prior"):
            if row.get(key, -1) >= best.get(key, {}).get(key, 0):
                best[key] = row
    return sentences


def troubles(row, best):
    """(name, how far beyond its bound, sentence) of every trouble, whether it is there or not."""
    if (teacher := row.get("teacher_accuracy")) is not None:
        sentence = f"the teacher answers {teacher:.0%} right with the demonstration before it: "
        sentence += "little to distil; change what it reads, or take a larger model"
        yield "teacher", TEACHER_GOOD - teacher, sentence
        start = best.get("teacher_accuracy", row)
        was = start["teacher_accuracy"]
        sentence = f"the teacher's accuracy fell from {was:.2f} to {teacher:.2f} since "
        sentence += f"{when(start)}: it follows its student; lower --lr or --ema_alpha, or freeze "
        yield "collapse", was - TEACHER_FALL - teacher, sentence + "the teacher"
    right = row.get("rollouts_correct")
    if right is not None and teacher is not None and row["step"]:  # SFT needs no rollouts
        sentence = f"{right:.0%} of the rollouts are correct after {row['step']} updates, a cold "
        sentence += "start: what is never sampled is hardly learned; try the forward KL, or SFT "
        yield "cold start", COLD_START - right, sentence + "first"
    if (endless := row.get("never_ended")) is not None:
        sentence = f"{endless:.0%} of the responses never end: raise the limit on their length, or "
        yield "decoding", endless - NEVER_ENDED, sentence + "look at how the prompts end"
    if (prior := row.get("prior")) is not None:
        start = best.get("prior", row)
        sentence = f"prior accuracy fell from {start['prior']:.2f} to {prior:.2f} since "
        sentence += (
            f"{when(start)}: it forgets; lower the learning rate, or train for fewer updates"
        )
        yield "forgetting", start["prior"] - FORGETTING - prior, sentence


def when(row):
    return (f"{row['skill']}, " if row.get("skill") else "") + f"step {row['step']}"
