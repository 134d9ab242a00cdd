"""Decoding as a CUDA graph: `train_gpt2.py --cuda_graphs`. What surrounds the recording is tested on a CPU; on a GPU it has not yet been run.

Launching the kernels of a small batch one by one takes longer than they run. A graph launches them all at once, but always on the same
memory and in the same shapes.
"""

import torch

from model import KVCache


class StaticKVCache(KVCache):
    """The same in shapes and addresses that never change, as a CUDA graph needs them: the length is a tensor, and attention
    reads every column, those not yet filled under a mask."""

    def __init__(self, model, batch_size, max_len):
        super().__init__(model, batch_size, max_len)
        self.kv.zero_()  # a masked column counts 0 times its value, and 0 times NaN is NaN
        self.length = torch.zeros((), dtype=torch.long, device=self.kv.device)

    def columns(self, T):
        return self.kv.size(4)

    def append(self, layer, k, v):
        new = self.length + torch.arange(k.size(2), device=k.device)
        self.kv[layer, 0].index_copy_(2, new, k.to(self.kv.dtype))
        self.kv[layer, 1].index_copy_(2, new, v.to(self.kv.dtype))
        return self.kv[layer]  # (2, B, H, S, D/H)


class GraphedGPT:
    """A GPT for `rollout` on CUDA: the first decoding step of a rollout is recorded, the others replay it. Holds the model's own weights."""

    def __init__(self, model):
        self.model, self.config, self.wte = model, model.config, model.wte
        self.load_state_dict = model.load_state_dict  # in place: a graph reads the same addresses

    def kv_cache(self, batch_size, max_len):
        self.replay = None  # a graph belongs to one cache
        return StaticKVCache(self.model, batch_size, max_len)

    def next_logits(self, idx, pad, cache):
        if idx.size(1) > 1:  # the prompt
            return self.model.next_logits(idx, pad, cache)
        if self.replay is None:
            self.idx = idx.clone()
            self.replay = record(lambda: self.model.next_logits(self.idx, pad, cache))
            cache.length -= 1  # what the run before the recording has added
        self.idx.copy_(idx)
        return self.replay()


def record(step):
    """A function that replays the kernels of step() on the same memory and returns the same output. Runs step() once, since the
    first call of a kernel may allocate, which a recording must not."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # other threads, NCCL's, go on
        output = step()

    def replay():
        graph.replay()
        return output

    return replay
