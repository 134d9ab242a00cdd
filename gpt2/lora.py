"""Low-rank adapters (LoRA, arXiv 2106.09685): train two small matrices beside every linear layer.

    y = x Wᵀ + b + alpha / rank (x Aᵀ) Bᵀ   W (out, in), b frozen; A (rank, in), B (out, rank)

B starts at 0, so that the student starts as the base. Base, student and an EMA teacher are separate
`GPT`s whose frozen weights are the same memory; what is the teacher's own is its adapters. The base
is the model without adapters, and a frozen teacher is the base itself.

All functions but `add_adapters` take a model without adapters too, and then mean all its weights.
"""

import copy

import torch
import torch.nn as nn

from model import GPT


class LoRALinear(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        out, width = linear.weight.shape
        A, B = torch.empty(rank, width), torch.zeros(out, rank)
        nn.init.kaiming_uniform_(A, a=5**0.5)  # as nn.Linear starts; drawn on the CPU everywhere
        self.lora_A, self.lora_B = (nn.Parameter(w.to(linear.weight.device)) for w in (A, B))

    def forward(self, x):
        # The frozen product is last: `fast.RecomputingBlock` then need not repeat it.
        return (self.scale * (x @ self.lora_A.t())) @ self.lora_B.t() + self.linear(x)

    @torch.no_grad()
    def merged_weight(self):  # (out, in)
        return torch.addmm(self.linear.weight, self.lora_B, self.lora_A, alpha=self.scale)


def add_adapters(model, rank, alpha):
    """Wrap the four linear layers of every block, in place; all other weights are frozen."""
    model.requires_grad_(False)
    model.lora = rank, alpha
    for block in model.h:
        for part in (block.attn, block.mlp):
            for name, linear in [*part.named_children()]:
                setattr(part, name, LoRALinear(linear, rank, alpha))
    return model


def share(model):
    """A copy of the model whose frozen weights are the same memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def trained(model):
    """{name: parameter} of what training changes."""
    named = dict(model.named_parameters())
    return {k: w for k, w in named.items() if ".lora_" in k} if hasattr(model, "lora") else named


def state(model):
    """What a checkpoint keeps of a model: the adapters, or all weights."""
    return {name: w.detach() for name, w in trained(model).items()}


def merged(model):
    """(name, weight) of the plain GPT that computes the same, one weight at a time."""
    for name, w in model.state_dict().items():
        if name.endswith(".linear.weight"):
            w = model.get_submodule(name.removesuffix(".linear.weight")).merged_weight()
        if ".lora_" not in name:
            yield name.replace(".linear.", "."), w


def merge(model):
    """The plain GPT that computes the same; without adapters, the model."""
    if not hasattr(model, "lora"):
        return model
    with torch.device("meta"):
        plain = GPT(model.config)
    plain.load_state_dict(dict(merged(model)), assign=True)
    return plain
