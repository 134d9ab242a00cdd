"""What a run records beside its loss: metrics, responses token by token, warnings.

The fields of metrics.jsonl and samples.jsonl are in data/README.md. Every look has the same prompts
and the same random numbers, so that what differs between two looks is the models.
"""

from collections import defaultdict

import torch

import sdft

# The bounds of `warnings`. None is the paper's.
TEACHER_GOOD = 0.5  # a teacher that is wrong more often than right pulls away from the answer
TEACHER_FALL = 0.2  # more than chance, also on a few dozen prompts
COLD_START = 0.02  # one correct rollout of fifty: most updates see none
NEVER_ENDED = 0.2  # so many responses have no end to learn from
FORGETTING = 0.1  # lost prior accuracy

N_SAMPLES = 3  # responses that are kept, of new and of prior prompts


@torch.no_grad()
def look(
    student,
    teacher,
    base,
    rows,
    decode,
    is_correct,
    max_new_tokens,
    eos_id,
    divergence="reverse",
    temperature=1.0,
    batch_size=64,
    rollout=sdft.rollout,
    completion_logits=sdft.completion_logits,
    **about,
):
    """Metrics {name: mean} on the new rows, and samples: three responses to new and prior rows.

    teacher     None for SFT: no metric of a teacher; the base judges with the demonstrations
    rows        dicts of the texts kind ("new" or "prior"), prompt, teacher_prompt, demonstration
                and expected (None if unknown), and the token ids student_ids and teacher_ids
    decode      token ids to text
    is_correct  (response, expected answer), as text, to a truth value
    about       phase, skill and step, for the samples
    """
    before_training, judge = about["step"] == 0, base if teacher is None else teacher
    entropy = lambda logits: torch.distributions.Categorical(logits=logits).entropy().tolist()
    end_ids = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    metrics, samples = defaultdict(list), []
    # The base does not change: without a teacher it answers before training only.
    for role in ["student", "teacher"] if teacher or before_training else ["student"]:
        of_student = role == "student"
        model = student if of_student else judge
        generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
        n_kept = {"new": 0, "prior": 0}
        for batch in (rows[i : i + batch_size] for i in range(0, len(rows), batch_size)):
            prompts = [row["student_ids"] for row in batch]
            teacher_prompts = [row["teacher_ids"] for row in batch]
            reads, heat = (prompts, temperature) if of_student else (teacher_prompts, 0)
            y, mask = rollout(model, reads, max_new_tokens, eos_id, heat, generator)
            contexts = (student, prompts), (judge, teacher_prompts), (base, prompts)
            logits = [completion_logits(*context, y) for context in contexts]  # (B, C, V) each
            for row, ids, n, *scores in zip(batch, y.tolist(), mask.sum(1).tolist(), *logits):
                ids, (s, t, b) = ids[:n], (x[:n].double() for x in scores)  # (C,), (C, V)
                correct = row["expected"] and bool(is_correct(decode(ids), row["expected"]))
                if row["kind"] == "new" and of_student:
                    metrics["rollouts_correct"] += [] if correct is None else [correct]
                    metrics["never_ended"] += [ids[-1] not in end_ids]
                    metrics["response_length"] += [n]
                    metrics["kl_student_base"] += sdft.token_divergence(s, b).tolist()
                    metrics["student_entropy"] += entropy(s)
                    metrics["teacher_entropy"] += entropy(t) if teacher else []
                elif row["kind"] == "new" and teacher:
                    metrics["teacher_accuracy"] += [] if correct is None else [correct]
                    metrics["kl_teacher_base"] += sdft.token_divergence(t, b).tolist()
                n_kept[row["kind"]] += 1
                if n_kept[row["kind"]] <= N_SAMPLES and (of_student or before_training):
                    texts = {k: v for k, v in row.items() if not k.endswith("_ids")} | about
                    texts |= {"role": role, "correct": correct}
                    samples.append(sample_row(ids, s, t, decode, divergence, **texts))
    return {name: sum(v) / len(v) for name, v in metrics.items() if v}, samples


@torch.enable_grad()
def sample_row(ids, student_logits, teacher_logits, decode, divergence, **about):
    """A row of samples.jsonl: a response of C token ids under both roles' logits (C, V)."""
    student_logits = student_logits.detach().double().requires_grad_()
    per_token = sdft.token_divergence(student_logits, teacher_logits.double(), divergence)  # (C,)
    (gradient,) = torch.autograd.grad(per_token.sum(), student_logits)  # (C, V)
    p, q = (x.detach().double().softmax(-1) for x in (student_logits, teacher_logits))  # (C, V)
    short = lambda number: float(f"{number.item():.5g}")

    def likeliest(probs):
        return [[i, decode([i]), short(probs[i])] for i in probs.topk(3).indices.tolist()]

    tokens = []
    for t, i in enumerate(ids):
        token = {"id": i, "text": decode([i]), "student": short(p[t, i]), "teacher": short(q[t, i])}
        token |= {"divergence": short(per_token[t]), "push": short(-gradient[t, i])}
        token |= {"reward": short(q[t, i].log() - p[t, i].log())}
        tokens.append(token | {"student_top": likeliest(p[t]), "teacher_top": likeliest(q[t])})
    return about | {"response": decode(ids), "divergence": divergence, "tokens": tokens}


def warnings(rows):
    """The sentences on the last of an arm's rows of metrics, which begin with its first look.

    A trouble is told of when it begins, not at every row that it lasts.
    """
    best, before, now = {}, {}, {}
    for row in rows:
        before, now = now, dict(troubles(row, best))
        for key in ("teacher_accuracy", "prior"):
            # A fall is counted from the last of the best rows.
            if row.get(key, -1) >= best.get(key, {}).get(key, 0):
                best[key] = row
    return [sentence for name, sentence in now.items() if name not in before]


def troubles(row, best):
    """(name, sentence) of every trouble in a row of metrics; `best` has the rows before it fell."""

    def fell(key, bound):
        start = best.get(key, row)
        if key in row and start[key] - row[key] > bound + 1e-6:
            since = ", ".join(filter(None, (start.get("skill"), f"step {start['step']}")))
            return f"fell from {start[key]:.2f} to {row[key]:.2f} since {since}"

    # What was not measured is no trouble.
    if (teacher := row.get("teacher_accuracy", 1)) < TEACHER_GOOD:
        sentence = f"the teacher answers {teacher:.0%} right with the demonstration before it: "
        yield "teacher", sentence + "little to distil; change what it reads, or take a larger model"
    if words := fell("teacher_accuracy", TEACHER_FALL):
        sentence = f"the teacher's accuracy {words}: it follows its student; lower --lr or "
        yield "collapse", sentence + "--ema_alpha, or freeze the teacher"
    # SFT, which has no teacher, needs no rollouts.
    right = row.get("rollouts_correct", 1) if "teacher_accuracy" in row else 1
    if right < COLD_START and row["step"]:
        sentence = f"{right:.0%} of the rollouts are correct after {row['step']} updates, a cold "
        sentence += "start: what is never sampled is hardly learned; try the JSD, or SFT first"
        yield "cold start", sentence
    if (endless := row.get("never_ended", 0)) > NEVER_ENDED:
        sentence = f"{endless:.0%} of the responses never end: raise the limit on their length, or "
        yield "decoding", sentence + "look at how the prompts end"
    if words := fell("prior", FORGETTING):
        sentence = f"prior accuracy {words}: it forgets; lower the learning rate, or train for "
        yield "forgetting", sentence + "fewer updates"
