"""The profile of a real model: launch parameters that the driver confirms, durations that add up."""

from __future__ import annotations

import torch

from bench import models
from bench.timing import measure
from opara_backend.profiling.device import current_device_spec
from opara_backend.profiling.occupancy import blocks_per_sm
from opara_backend.report.record import collect


def test_profile_of_googlenet() -> None:
    entry = models.get("googlenet")
    model, x = entry.build().cuda().half().eval(), entry.inputs(1)[0].cuda().half()
    with torch.inference_mode(), collect() as records:
        sequential = torch.compile(model, backend="opara", options={"policy": "sequential"})
        sequential(x)
        sequential(x)
        samples = measure({"one stream": lambda: sequential(x)}, rounds=3, device=torch.device("cuda"))
    ((plan, captured),) = records[0].plans.values()
    assert captured
    device = current_device_spec()
    assert plan.profile.device == device
    for kernel, profile in zip(plan.graph.kernels, plan.profile.kernels, strict=True):
        assert profile.launches, kernel
        for launch in profile.launches:
            assert blocks_per_sm(launch, device) >= 1
            assert launch.registers > 0
        assert 0 < profile.demand <= 1
        assert 0.5e-6 <= profile.duration < 1e-3
    assert {p.memory_bound for p in plan.profile.kernels} == {True, False}
    # Kernels measured one by one take about as long as all of them in one chain.
    assert samples["one stream"].gpu is not None
    whole = min(samples["one stream"].gpu)
    assert 0.6 * whole < sum(plan.profile.durations()) < 1.6 * whole


def test_googlenet_is_faster_than_reduce_overhead() -> None:
    entry = models.get("googlenet")
    model, x = entry.build().cuda().half().eval(), entry.inputs(1)[0].cuda().half()
    with torch.inference_mode():
        ours = torch.compile(model, backend="opara")
        stock = torch.compile(model, mode="reduce-overhead")
        for _ in range(4):
            ours(x)
            stock(x)
        samples = measure({"opara": lambda: ours(x), "stock": lambda: stock(x)}, rounds=7, device=torch.device("cuda"))
    assert samples["opara"].gpu is not None
    assert samples["stock"].gpu is not None
    assert sorted(samples["stock"].gpu)[3] / sorted(samples["opara"].gpu)[3] >= 1.3
