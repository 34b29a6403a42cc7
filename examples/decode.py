"""A decode loop with a static key-value cache: one captured step, replayed for every token.

    python examples/decode.py [--device cuda] [--small] [--tokens 64]

The cache lives in buffers that each step writes in place, at a position that is a tensor: so every step has the same
shapes and addresses, and is one replay. Weights are seeded; the tokens mean nothing, their agreement with eager does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from shared import describe, parser, synchronize
from torch import Tensor, nn

from opara_backend.report.record import collect


class Block(nn.Module):
    """Attention over the cache, and an MLP."""

    keys: Tensor
    values: Tensor

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(length, heads, width // heads))

    def forward(self, x: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).view(1, self.heads, -1) for layer in (self.query, self.key, self.value))
        self.keys.index_copy_(0, position, k)
        self.values.index_copy_(0, position, v)
        keys, values = (cache.transpose(0, 1).unsqueeze(0) for cache in (self.keys, self.values))
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=seen)
        x = x + self.out(mixed.reshape(1, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A small decoder-only language model: one token in, the next one out."""

    def __init__(self, layers: int, width: int, heads: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, length) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        x = self.tokens(token) + self.positions(position)
        seen = (torch.arange(self.length, device=token.device) <= position).view(1, 1, 1, -1)
        for block in self.blocks:
            x = block(x, position, seen)
        return self.head(self.norm(x)).argmax(-1)


def generate(step: nn.Module, prompt: Sequence[int], tokens: int, device: str) -> list[int]:
    """Feed the prompt, then `tokens` times what came out. Nothing is read back before the end."""
    token, made = torch.tensor([prompt[0]], device=device), []
    places = torch.arange(len(prompt) + tokens - 1, device=device).unsqueeze(1)
    with torch.inference_mode():
        for place in range(len(places)):
            found = step(token, places[place])
            if place + 1 < len(prompt):
                token = torch.tensor([prompt[place + 1]], device=device)
            else:
                token = found
                made.append(found)
    return torch.cat(made).tolist()


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--tokens", type=int, default=64)
    chosen = arguments.parse_args(argv)
    layers, width, heads, vocabulary = (2, 32, 4, 50) if chosen.small else (8, 1024, 16, 32_000)
    prompt = [3, 1, 4, 1, 5]
    torch.manual_seed(0)
    model = Decoder(layers, width, heads, vocabulary, len(prompt) + chosen.tokens).to(chosen.device).eval()
    twin = copy.deepcopy(model)  # with a cache of its own
    fast = torch.compile(model, backend="opara")
    with collect() as records:  # the first loop compiles and captures, and is right from its first token
        first = generate(fast, prompt, chosen.tokens, chosen.device)
    seconds = {}
    for name, step in (("eager", twin), ("opara", fast)):
        synchronize(chosen.device)
        start = time.perf_counter()
        found = generate(step, prompt, chosen.tokens, chosen.device)
        seconds[name] = time.perf_counter() - start
        # Two near-equal logits may change places by rounding, after which the texts go apart.
        same = next((i for i, (a, b) in enumerate(zip(found, first, strict=True)) if a != b), len(found))
        print(f"{name}: {chosen.tokens / seconds[name]:.0f} tokens/s, {same} of {len(found)} tokens as generated first")
        if same < len(found) // 2 or (name == "opara" and found != first):
            raise AssertionError(f"{name} generated {found}, at first it was {first}")
    describe(records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
