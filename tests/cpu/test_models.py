"""The benchmark's models: they build and run, repeatably and in one graph, and are the size their papers say.

Reduced sizes run for real; full sizes run on the meta device, which computes shapes and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bench import models
from bench.models.randwire import watts_strogatz
from opara_backend.demo.googlenet import googlenet


@pytest.fixture(params=models.names())
def model(request: pytest.FixtureRequest) -> models.BenchModel:
    return models.get(request.param)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


def tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(model: models.BenchModel) -> nn.Module:
    with torch.device("meta"):
        return model.build()


@torch.no_grad()
def test_small_variant_runs_and_compiles_as_one_graph(model: models.BenchModel) -> None:
    small = model.reduced()
    module, inputs = small.build(), small.inputs(2)
    assert small.small
    assert not model.small
    assert not module.training
    outputs = tensors(module(*inputs))
    for output in outputs:
        assert output.shape[0] == 2
        assert output.isfinite().all()
        assert output.std() > 1e-3, "the signal vanished on its way"
        assert output.abs().max() < 1e3, "the signal exploded on its way"
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for output, expected in zip(tensors(compiled(*inputs)), outputs, strict=True):
        torch.testing.assert_close(output, expected)


@torch.no_grad()
def test_two_builds_are_equal_and_global_random_state_is_untouched(model: models.BenchModel) -> None:
    small = model.reduced()
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    first, first_inputs = small.build(), small.inputs(2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    torch.rand(7)  # the second build starts from another global state
    second, second_inputs = small.build(), small.inputs(2)
    assert first.state_dict().keys() == second.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert all(torch.equal(a, b) for a, b in zip(first_inputs, second_inputs, strict=True))
    outputs, again = tensors(first(*first_inputs)), tensors(second(*second_inputs))
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


@torch.no_grad()
def test_full_size_fits_its_inputs(model: models.BenchModel) -> None:
    module = on_meta(model)
    for batch in (model.batches[0], model.batches[-1]):
        inputs = model.inputs(batch)
        assert all(tensor.device.type == "cpu" for tensor in inputs)
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in inputs)
        outputs = tensors(module(*(tensor.to("meta") for tensor in inputs)))
        assert all(output.shape[0] == batch for output in outputs)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("googlenet", 6_624_904),
        ("inception_v3", 23_834_568),
        ("squeezenet", 1_235_496),
        ("resnet50", 25_557_032),
        ("nasnet_large", 88_753_150),
        ("bert_base", 109_482_240),
        ("vit_b16", 86_567_656),
        ("t5_small", 60_506_624),
    ],
)
def test_parameter_count_is_the_published_one(name: str, count: int) -> None:
    assert parameters(on_meta(models.get(name))) == count


def test_randwire_has_about_the_published_size() -> None:
    """About, for its graphs are random: the paper gives 5.6 +- 0.1 million."""
    assert parameters(on_meta(models.get("randwire"))) == pytest.approx(5.6e6, abs=1e5)


def test_bert_encoder_without_embeddings_has_85_million_parameters() -> None:
    layers = on_meta(models.get("bert_base")).get_submodule("layers")
    assert parameters(layers) == pytest.approx(85.05e6, rel=1e-3)


@torch.no_grad()
def test_googlenet_keeps_its_signal_through_every_layer() -> None:
    """On a smaller image: the size changes no statistics worth speaking of."""
    sizes: list[float] = []
    module = googlenet()
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda *arguments: sizes.append(arguments[2].std().item()))
    module(models.get("googlenet").inputs(1)[0][:, :, :128, :128])
    assert len(sizes) == 57
    assert min(sizes) > 0.3
    assert max(sizes) < 30


def test_googlenet_weights_follow_the_seed() -> None:
    first, second = googlenet(num_classes=3, seed=1), googlenet(num_classes=3, seed=2)
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'inception_v3'\? known: googlenet"):
        models.get("inceptionv3")
    with pytest.raises(ValueError, match=r"'zzz'; known: googlenet"):
        models.get("zzz")


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama_decode", "moe_decode"])
def test_decode_step_writes_its_slot_of_the_cache_and_no_other(name: str) -> None:
    small = models.get(name).reduced()
    module, (ids, position) = small.build(), small.inputs(3)
    before = {key: value.clone() for key, value in module.named_buffers()}
    first = module(ids, position)
    torch.testing.assert_close(module(ids, position), first)
    length = len(before["rotary.cos"])
    slots = [row * length + int(position) for row in range(3)]
    for key, value in module.named_buffers():
        changed = (value != before[key]).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == (slots if key.endswith((".keys", ".values")) else []), key


def test_decode_inputs_refuse_a_batch_the_cache_cannot_hold() -> None:
    with pytest.raises(ValueError, match="33 does not fit"):
        models.get("llama_decode").inputs(33)


def test_random_graphs_have_ring_many_edges_that_point_upwards() -> None:
    graph = watts_strogatz(32, 4, 0.75, seed=5)
    assert sum(map(len, graph)) == 32 * 4 // 2
    assert all(source < node for node, sources in enumerate(graph) for source in sources)
    assert graph == watts_strogatz(32, 4, 0.75, seed=5)
    assert graph != watts_strogatz(32, 4, 0.75, seed=6)
    unrewired = watts_strogatz(6, 2, 0.0, seed=0)
    assert unrewired == ((), (0,), (1,), (2,), (3,), (0, 4))


def test_random_graphs_are_the_same_on_every_python() -> None:
    expected = ((), (0,), (0, 1), (2,), (1, 2), (0, 2, 3, 4), (3, 4, 5), (1, 3, 5))
    assert watts_strogatz(8, 4, 0.75, seed=0) == expected
