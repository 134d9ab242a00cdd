"""SDFT of a Hugging Face model, to copy with sdft.py: any causal model with a chat template.

    student, tokenizer = ...  # AutoModelForCausalLM in float32, AutoTokenizer; transformers 5
    teacher, optimizer = copy.deepcopy(student), torch.optim.AdamW(student.parameters(), 1e-5)
    prompts = [chat(tokenizer, x) for x, c in pairs]
    teacher_prompts = [chat(tokenizer, teacher_context(x, c)) for x, c in pairs]
    for rows in torch.randperm(len(pairs)).split(8):
        x, xc = [prompts[i] for i in rows], [teacher_prompts[i] for i in rows]
        loss = sdft_step(student, teacher, optimizer, x, xc, eos_ids(student, tokenizer))

Shapes are those of sdft.py. For bfloat16 put `torch.autocast` around the loop. Teacher None is a
PEFT student without its adapter, frozen. SmolLM2-135M learns twice as much at temperature 0.5.
"""

import contextlib
from importlib.metadata import version

import torch

from sdft import clip_and_step, ema_update, left_pad, sdft_loss


def chat(tokenizer, *turns, system=None, **template):
    """Token ids of a chat, the user's turn first; `template` goes to the tokenizer's template."""
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    template |= dict(add_generation_prompt=True, return_dict=False)
    return tokenizer.apply_chat_template(first + turns, **template)


def eos_ids(model, tokenizer):
    """The tokens that end a response, an int or a list: a turn may have an end of its own."""
    ids = model.generation_config.eos_token_id
    return tokenizer.eos_token_id if ids is None else ids


def forward(model, tokens, n_pad, n_past=0, **settings):
    """The model's output for tokens (B, N), which come after the n_past columns in its cache."""
    if n_past == 0:  # Under autocast no cast of older weights, or without gradients, serves it.
        torch.clear_autocast_cache()
    # Positions count real tokens only: without this, left padding would shift every position.
    positions = torch.arange(n_past + tokens.size(1), device=tokens.device).expand(len(tokens), -1)
    positions = positions if n_pad is None else positions - n_pad[:, None]
    settings |= dict(attention_mask=(positions >= 0).long())
    return model(tokens, position_ids=positions.clamp(min=0)[:, n_past:], **settings)


@torch.no_grad()
def rollout(model, prompts, max_new_tokens, eos_ids, temperature=1.0, generator=None):
    """The model's responses, as from `sdft.rollout`: completions (B, C) and mask (B, C)."""
    # Not by `generate`, to which the model's folder adds top_k, min_p, penalties, beams ...
    tokens, n_pad = left_pad(prompts, model.device)  # (B, P)
    ends = torch.tensor(eos_ids, device=model.device).view(-1)
    P, n_past, settings = tokens.size(1), 0, dict(use_cache=True, logits_to_keep=1)
    while tokens.size(1) < P + max_new_tokens and not torch.isin(tokens[:, P:], ends).any(1).all():
        out = forward(model, tokens[:, n_past:], n_pad, n_past, **settings)
        name = "cache" if "cache" in out else "past_key_values"  # It depends on the version.
        settings[name] = out[name]
        n_past, logits = tokens.size(1), out.logits[:, -1].float()  # (B, V)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, token], 1)
    is_end = torch.isin(tokens[:, P:], ends).long()
    mask = is_end.cumsum(1) - is_end == 0  # up to and including the first end token
    return tokens[:, P:].where(mask, ends[0]), mask


def completion_logits(model, prompts, completions):
    """Logits (B, C, V) of completions (B, C), as from `sdft.completion_logits`."""
    tokens, n_pad = left_pad(prompts, completions.device)
    tokens = torch.cat([tokens, completions[:, :-1]], 1)  # (B, P + C - 1)
    return forward(model, tokens, n_pad, use_cache=False, logits_to_keep=completions.size(1)).logits


def distill_loss(student, teacher, prompts, teacher_prompts, completions, mask, divergence):
    """`sdft.distill_loss`, of given completions (B, C)."""
    adapter_off = student.disable_adapter() if teacher is None else contextlib.nullcontext()
    with torch.no_grad(), adapter_off:
        teacher_logits = completion_logits(teacher or student, teacher_prompts, completions)
    logits = completion_logits(student, prompts, completions)  # (B, C, V)
    return sdft_loss(logits, teacher_logits, mask, divergence)


def check(student, teacher, longest):
    """ValueError for what would otherwise go wrong without a word."""
    if int(version("transformers").split(".")[0]) < 5:
        raise ValueError('older models ignore logits_to_keep; pip install "transformers>=5"')
    if any(torch.finfo(p.dtype).bits < 32 for p in student.parameters() if p.requires_grad):
        raise ValueError("half precision loses small updates; load with dtype=torch.float32")
    if student.training or (teacher is not None and teacher.training):
        raise ValueError("dropout differs between the roles; call student.eval(), teacher.eval()")
    if longest > getattr(student.config.get_text_config(), "max_position_embeddings", longest):
        raise ValueError(f"prompt and response need {longest} positions, the model has fewer")


def sdft_step(
    student,
    teacher,
    optimizer,
    prompts,
    teacher_prompts,
    eos_ids,
    max_new_tokens=32,
    divergence="forward",
    alpha=0.02,
    temperature=1.0,
    skip_tokens=0,
):
    """`sdft.train_step`: Algorithm 1 on one minibatch, by default with the paper's forward KL."""
    check(student, teacher, max(map(len, prompts + teacher_prompts)) + max_new_tokens)
    y, mask = rollout(student, prompts, max_new_tokens, eos_ids, temperature)  # (B, C)
    mask[:, :skip_tokens] = False
    loss, _ = distill_loss(student, teacher, prompts, teacher_prompts, y, mask, divergence)
    loss.backward()
    clip_and_step(student, optimizer, loss.item())
    ema_update(teacher, student, alpha if teacher else 0.0)
    return loss.item()
