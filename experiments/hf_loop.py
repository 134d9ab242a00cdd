"""SDFT of a Hugging Face model, to copy with sdft.py: any causal model with a chat template.

    student, tokenizer = ...  # AutoModelForCausalLM in float32, AutoTokenizer
    teacher, optimizer = copy.deepcopy(student), torch.optim.AdamW(student.parameters(), 1e-5)
    prompts = [chat(tokenizer, x) for x, c in pairs]
    teacher_prompts = [chat(tokenizer, teacher_context(x, c)) for x, c in pairs]
    for rows in batches(len(pairs), batch_size=8, steps=100):
        x, xc = [prompts[i] for i in rows], [teacher_prompts[i] for i in rows]
        loss = sdft_step(student, teacher, optimizer, x, xc, tokenizer.eos_token_id)

Shapes are those of sdft.py. Weights and loss are in float32, the forward passes in `dtype`. A small
model's samples may be poor: SmolLM2-135M learns twice as much at temperature 0.5 (README.md).
"""

import torch

from sdft import clip_and_step, ema_update, left_pad, sdft_loss


def chat(tokenizer, *turns):
    """Token ids of a chat, the user's turn first, up to where the model answers."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def batches(n, batch_size, steps):
    """Row numbers of `steps` batches; every row comes once before any comes again."""
    order = []
    for _ in range(steps):
        while len(order) < batch_size:
            order += torch.randperm(n).tolist()
        yield order[:batch_size]
        order = order[batch_size:]


def padded(prompts, device):
    """Token ids (B, P), padded on the left, and their attention mask (B, P)."""
    tokens, _ = left_pad(prompts, device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return tokens, (torch.arange(tokens.size(1), 0, -1, device=device) <= lengths[:, None]).long()


@torch.no_grad()
def respond(model, prompts, max_new_tokens, eos_id, temperature=1.0, dtype=torch.float32):
    """The model's responses: completions (B, C) and mask (B, C), as from `sdft.rollout`."""
    tokens, attention = padded(prompts, model.device)
    how = dict(attention_mask=attention, max_new_tokens=max_new_tokens, do_sample=temperature > 0)
    how |= dict(eos_token_id=eos_id, pad_token_id=eos_id, repetition_penalty=1.0)
    if temperature > 0:  # By default `generate` samples from the 50 likeliest tokens only.
        how |= dict(temperature=temperature, top_k=0, top_p=1.0)
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        tokens = model.generate(tokens, **how)
    completions = tokens[:, attention.size(1) :]  # (B, C)
    is_end = (completions == eos_id).long()
    return completions, is_end.cumsum(1) - is_end == 0  # up to and including the first end token


def completion_logits(model, prompts, completions, dtype=torch.float32):
    """Logits (B, C, V) of completions (B, C), as from `sdft.completion_logits`."""
    tokens, attention = padded(prompts, completions.device)
    tokens = torch.cat([tokens, completions[:, :-1]], 1)  # (B, P + C - 1)
    attention = torch.cat([attention, torch.ones_like(completions[:, :-1])], 1)
    # Positions count real tokens only: without them, left padding would shift every position.
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    how = dict(attention_mask=attention, position_ids=positions, use_cache=False)
    with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
        return model(tokens, logits_to_keep=completions.size(1), **how).logits


def distill_loss(student, teacher, prompts, teacher_prompts, completions, mask, divergence, dtype):
    """`sdft.distill_loss`, of given completions (B, C)."""
    logits = completion_logits(student, prompts, completions, dtype)  # (B, C, V)
    with torch.no_grad():
        teacher_logits = completion_logits(teacher, teacher_prompts, completions, dtype)
    return sdft_loss(logits, teacher_logits, mask, divergence)


def sdft_step(
    student,
    teacher,
    optimizer,
    prompts,
    teacher_prompts,
    eos_id,
    max_new_tokens=32,
    divergence="forward",
    alpha=0.02,
    temperature=1.0,
    skip_tokens=0,
    dtype=torch.float32,
):
    """`sdft.train_step`: Algorithm 1 on one minibatch, by default with the paper's forward KL."""
    y, mask = respond(student, prompts, max_new_tokens, eos_id, temperature, dtype)  # (B, C)
    mask[:, :skip_tokens] = False
    loss, _ = distill_loss(student, teacher, prompts, teacher_prompts, y, mask, divergence, dtype)
    loss.backward()
    clip_and_step(student, optimizer, loss.item())
    if alpha:  # A frozen teacher may be shared with others.
        ema_update(teacher, student, alpha)
    return loss.item()
