"""What the tests of several experiments share."""

import pytest
import torch

from experiments import common


@pytest.fixture(autouse=True)
def restore_the_process():
    threads, before = torch.get_num_threads(), dict(vars(common.options))
    yield
    torch.set_num_threads(threads)
    vars(common.options).clear()
    vars(common.options).update(before)


@pytest.fixture
def quick():
    common.options.quick = True


class Rules(torch.nn.Module):
    """Stands in for a GPT: `logits` of the tokens so far, a list of ids, are given by a rule."""

    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(1, 1)  # only to have parameters and a device

    def kv_cache(self, *sizes):
        return []

    def hidden(self, tokens, n_pad=None, cache=None):
        """What every position has seen, ids (B, T, S), -1 where there is nothing."""
        if cache is not None:
            cache.append(tokens)
        whole = tokens if cache is None else torch.cat(cache, 1)  # (B, S)
        n_pad, column = 0 if n_pad is None else n_pad[:, None, None], torch.arange(whole.shape[1])
        is_seen = (n_pad <= column) & (column <= column[-tokens.shape[1] :, None])  # (B, T, S)
        return whole[:, None].where(is_seen, -1)

    def lm_head(self, seen):
        rows = [[i for i in row if i >= 0] for row in seen.flatten(0, -2).tolist()]
        return torch.tensor([self.logits(row) for row in rows]).view(*seen.shape[:-1], -1)
