"""What experiments/hf_loop.py and real_model.py guarantee, on tiny random models."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import files
from experiments import common, hf_loop, instructions, real_controls, real_model, runner
from experiments.real_model import Training
from sdft import sdft_loss

TEXTS = ["Who built the lighthouse?", "A bridge.", "Where?"]
RESULTS = Path(real_model.__file__).parent / "results"


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Options as the command line sets them; no more tokens than a test needs."""
    before = vars(common.options).copy()
    vars(common.options).update(dtype="float32", model=None, device="cpu", quick=False)
    monkeypatch.setattr(real_model, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(real_model, "MAX_NEW_TRAINED", 4)
    yield
    vars(common.options).clear()
    vars(common.options).update(before)


def save_tiny(kind, path):
    """A model of random weights and a tokenizer of bytes with ChatML."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(special + alphabet)}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=special[0], bos_token=special[1]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
        "'<|im_end|>\\n' }}{% endfor %}<|im_start|>assistant\n{{ 'think' if enable_thinking }}"
    )
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(vocab), initializer_range=0.2)
    if kind == "gpt2":
        sizes |= dict(n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    else:
        sizes |= dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ("llama", "gpt2")}


@pytest.fixture(params=["llama", "gpt2"])
def either(folders, request):
    model, tokenizer = real_model.load(str(folders[request.param]))
    return copy.deepcopy(model), tokenizer


@pytest.fixture
def tiny(folders):
    model, tokenizer = real_model.load(str(folders["llama"]))
    return copy.deepcopy(model), tokenizer


def chats(tokenizer, texts):
    return [hf_loop.chat(tokenizer, text) for text in texts]


# --- hf_loop.py ----------------------------------------------------------------------------------


def test_rows_do_not_depend_on_each_other(either):
    """Logits and greedy responses of a ragged batch are those of each row alone."""
    model, tokenizer = either
    eos, prompts = tokenizer.eos_token_id, chats(tokenizer, TEXTS)
    assert len({len(p) for p in prompts}) == 3
    y, mask = hf_loop.rollout(model, prompts, 12, eos, temperature=0)
    with torch.no_grad():
        logits = hf_loop.completion_logits(model, prompts, y)  # (B, C, V)
        for i, prompt in enumerate(prompts):
            row = torch.tensor([prompt + y[i].tolist()])
            alone = model(row).logits[0, len(prompt) - 1 : -1]  # (C, V)
            torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)
            assert torch.equal(logits[i].argmax(-1)[mask[i]], y[i][mask[i]])


def test_samples_are_of_the_models_whole_distribution(tiny):
    """Token by token from the softmax at the temperature, whatever the model's folder asks for."""
    model, tokenizer = tiny
    bent = dict(temperature=0.1, top_k=2, top_p=0.1, min_p=0.9, typical_p=0.1, num_beams=4)
    bent |= dict(repetition_penalty=5.0, no_repeat_ngram_size=1, suppress_tokens=[*range(200)])
    for name, value in bent.items():
        setattr(model.generation_config, name, value)
    x = chats(tokenizer, TEXTS)
    y, _ = hf_loop.rollout(model, x, 6, -1, 0.7, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for t in range(6):
        with torch.no_grad():
            logits = hf_loop.completion_logits(model, x, y[:, : t + 1])[:, t]
        expected = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)[:, 0]
        assert torch.equal(y[:, t], expected)


def test_every_end_token_ends_a_response(tiny):
    """The first of them is the last token with loss; the rollout ends with the last response."""
    model, tokenizer = tiny
    x = chats(tokenizer, TEXTS)
    free, mask = hf_loop.rollout(model, x, 12, -1, temperature=0)
    assert mask.all() and mask.shape == (3, 12)
    ends = [free[0, 3].item(), free[1, 5].item(), free[2, 2].item()]
    y, mask = hf_loop.rollout(model, x, 12, ends, temperature=0)
    for row, kept, all_tokens in zip(y, mask, free.tolist()):
        length = 1 + min(all_tokens.index(end) for end in ends if end in all_tokens)
        assert kept.tolist() == [t < length for t in range(len(kept))]
        assert row[:length].tolist() == all_tokens[:length] and (row[length:] == ends[0]).all()
    assert mask[:, -1].any() and mask.size(1) < 12
    one, _ = hf_loop.rollout(model, x[:1], 12, ends[0], temperature=0)
    assert one[0].tolist() == free[0, : free[0].tolist().index(ends[0]) + 1].tolist()


def test_end_tokens_are_the_models_or_else_the_tokenizers(tiny):
    """An int, a list, or none."""
    model, tokenizer = tiny
    for own, expected in ((7, 7), ([7, 9], [7, 9]), (0, 0), (None, tokenizer.eos_token_id)):
        model.generation_config.eos_token_id = own
        assert hf_loop.eos_ids(model, tokenizer) == expected


def test_a_chat_has_turns_and_arguments(tiny):
    """A demonstration can stand as what the model said before, a system turn before all."""
    _, tokenizer = tiny
    ids = hf_loop.chat(tokenizer, "Where?", "There.", "Why?", system="Rhyme.", enable_thinking=True)
    roles = [
        "system\nRhyme.",
        "user\nWhere?",
        "assistant\nThere.",
        "user\nWhy?",
        "assistant\nthink",
    ]
    turns = tokenizer.decode(ids).split("<|im_start|>")[1:]
    assert [turn.split("<|im_end|>")[0] for turn in turns] == roles
    assert tokenizer.decode(hf_loop.chat(tokenizer, "?")).endswith("assistant\n")


def test_a_step_is_algorithm_1(either):
    """Loss and weights of a step by hand: rollout, both roles' logits, loss, AdamW, EMA."""
    base, tokenizer = either
    eos, prompts = tokenizer.eos_token_id, chats(tokenizer, TEXTS)
    hints = chats(tokenizer, [text + " A hint." for text in TEXTS])
    student, teacher, by_hand = (copy.deepcopy(base) for _ in range(3))
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    settings = dict(divergence="reverse", alpha=0.1, temperature=0.7, skip_tokens=1)
    loss = hf_loop.sdft_step(student, teacher, optimizer, prompts, hints, eos, 8, **settings)
    torch.manual_seed(0)
    y, mask = hf_loop.rollout(base, prompts, 8, eos, 0.7)
    mask[:, 0] = False
    logits = hf_loop.completion_logits(by_hand, prompts, y)
    with torch.no_grad():
        targets = hf_loop.completion_logits(base, hints, y)
    wanted, _ = sdft_loss(logits, targets, mask, "reverse")
    wanted.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    torch.optim.AdamW(by_hand.parameters(), 1e-2, weight_decay=0.0).step()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    models = (m.parameters() for m in (student, teacher, by_hand, base))
    for ours, followed, theirs, start in zip(*models, strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(followed, 0.1 * theirs + 0.9 * start)


def steps(student, teacher, tokenizer, n=3, **settings):
    """n steps of SDFT; the losses."""
    x, xc = chats(tokenizer, TEXTS), chats(tokenizer, [text + " A hint." for text in TEXTS])
    optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), 1e-3)
    torch.manual_seed(0)
    args = student, teacher, optimizer, x, xc, tokenizer.eos_token_id
    return [hf_loop.sdft_step(*args, max_new_tokens=4, **settings) for _ in range(n)]


@pytest.mark.parametrize("method", ["sdft", "expert"])
def test_autocast_around_the_loop_loses_nothing(tiny, method):
    """The weights after three updates are those with autocast around each pass alone."""
    base, tokenizer = tiny
    facts = real_model.load_rows("facts")[:2]
    training = Training(method, 1e-3, 3, n_other=0, batch_size=2)
    forward, found = hf_loop.forward, []

    def apart(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    for around in (True, False):
        student = copy.deepcopy(base)
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", enabled=around):
            if around:  # casts that were made without gradients
                with torch.no_grad():
                    hf_loop.completion_logits(student, [[5, 6]], torch.tensor([[7, 8]]))
            else:
                patch.setattr(hf_loop, "forward", apart)
            [*real_model.learn(student, base, tokenizer, facts, 0, training)]
        assert not torch.equal(student.lm_head.weight, base.lm_head.weight)
        found.append(student.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_peft_student_is_its_own_teacher(tiny):
    """Without the adapter, which alone is trained, and as a copy of the base would be."""
    peft = pytest.importorskip("peft")
    base, tokenizer = tiny
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    found = []
    for teacher in (None, copy.deepcopy(base)):
        torch.manual_seed(0)
        student = peft.get_peft_model(copy.deepcopy(base), config).eval()
        losses = steps(student, teacher, tokenizer, alpha=0.0)
        with student.disable_adapter():
            torch.testing.assert_close(*[m(torch.tensor([[5]])).logits for m in (student, base)])
        found.append((losses, peft.get_peft_model_state_dict(student)))
    torch.testing.assert_close(*found)
    assert all(w.abs().sum() > 0 for w in found[0][1].values())


def half(student, teacher):
    student.to(torch.bfloat16)


def too_long(student, teacher):
    student.config.max_position_embeddings = 55  # the teacher's longest prompt has 52 tokens


REFUSED = [
    (half, "half precision .* load with dtype=torch.float32"),
    (too_long, "prompt and response need 56 positions"),
    (lambda student, teacher: student.train(), r"call student.eval\(\)"),
    (lambda student, teacher: teacher.train(), r"teacher.eval\(\)"),
]


@pytest.mark.parametrize("damage, sentence", REFUSED)
def test_what_would_train_wrongly_is_refused(tiny, damage, sentence):
    """With a sentence, before anything moves."""
    student, tokenizer = tiny
    teacher, before = copy.deepcopy(student), copy.deepcopy(student)
    damage(student, teacher)
    with pytest.raises(ValueError, match=sentence):
        steps(student, teacher, tokenizer)
    torch.testing.assert_close(student.float().state_dict(), before.state_dict(), atol=0.01, rtol=0)


def test_an_older_transformers_is_refused(tiny, monkeypatch):
    """GPT-2 of transformers 4 has no logits_to_keep."""
    monkeypatch.setattr(hf_loop, "version", lambda package: "4.57.1")
    with pytest.raises(ValueError, match="transformers>=5"):
        steps(*tiny[:1], copy.deepcopy(tiny[0]), tiny[1])
