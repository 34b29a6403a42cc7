"""A long run of everything at once: threads, mixed shapes, models that come and go, parameters that change.

`python -m tests.soak --minutes 10 --threads 8 --out FILE`, on the GPU if there is one. Every result is checked against
eager; memory is sampled and must be flat over the last third. Exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import gc
import json
import logging
import random
import sys
import threading
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from bench.about import environment
from opara_backend import __version__
from opara_backend.report.record import GraphRecord, collect

SIZE, ROWS = 64, 64
RELOAD, UPDATE = 1 / 5000, 1 / 200  # of a thread's turns


class Branches(nn.Module):
    """Four branches over rows, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.chains = nn.ModuleList(nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([chain(x + i) for i, chain in enumerate(self.chains)], 1).softmax(1)


class Attention(nn.Module):
    """Self-attention over rows, and a branch beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.beside = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(0).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(0)
        return attended + self.beside(x).relu() @ self.beside.weight


class Convolutions(nn.Module):
    """Two branches of convolutions over rows, which are channels here."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(SIZE, SIZE, 1), nn.Conv1d(SIZE, SIZE, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.t().unsqueeze(0)
        return torch.cat([self.left(rows).relu(), self.right(rows).tanh()], 1).sum(2).squeeze(0)


class Gate:
    """Many may be inside together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = self._waiting = 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """With others, but with nobody who wants to be alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While nobody is inside, and nobody may enter."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._inside)
                yield
            finally:
                self._waiting -= 1
                self._changed.notify_all()


class Service:
    """A compiled model that many threads call, one may update, and one may replace."""

    def __init__(self, make: Callable[[], nn.Module], device: str) -> None:
        self._make, self.device = make, device
        self.gate = Gate()
        self.replace()

    def replace(self) -> None:
        """A new model, compiled anew and called with every size there will be; the old one is dropped.

        What was compiled for it goes when Python finds it, as its class is part of a reference cycle: now, so that
        memory tells what is kept, and not when the collector last ran.
        """
        self.call = self.model = None
        gc.collect()
        self.model = with_own_code(self._make()).to(self.device).eval()
        self.call = torch.compile(self.model, backend="opara", dynamic=True, options={"max_captures": 4})
        for rows in range(1, ROWS + 1):
            self.call(torch.ones(rows, SIZE, device=self.device))

    def update(self, draw: random.Random) -> None:
        """Change all parameters, in place or by new memory."""
        moves = draw.random() < 0.5
        for parameter in self.model.parameters():
            new = parameter.data * draw.uniform(0.9, 1.1)
            if moves:
                parameter.data = new
            else:
                parameter.data.copy_(new)
        # Callers look at their results, so the GPU is done with the old values, and must be done with writing the new.
        settle(self.device)


def settle(device: str) -> None:
    """Wait for what this thread has launched. Not for the device, which CUDA refuses while another thread captures."""
    if device == "cuda":
        torch.cuda.current_stream().synchronize()


def with_own_code(model: nn.Module) -> nn.Module:
    """`model`, of a class whose code nobody shares: it is compiled for itself, and its graphs go when it goes."""
    shared = type(model).forward
    own = types.FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__)
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": own})
    return model


def turns(services: list[Service], world: Gate, seed: int, until: float, done: Counter[str], errors: list[str]) -> None:
    """One thread: calls, and now and then an update or a new model, until the time is over.

    Compiling stops the world: under any backend, torch refuses calls of compiled code while another thread traces.
    """
    draw = random.Random(seed)
    device = services[0].device
    numbers = torch.Generator(device).manual_seed(seed)  # threads that shared one would have no reproducible inputs
    own = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), own:
        while time.monotonic() < until and not errors:
            service = draw.choice(services)
            chance = draw.random()
            try:
                if chance < RELOAD:
                    with world.alone():
                        service.replace()
                        settle(service.device)
                    done["models compiled"] += 1
                elif chance < RELOAD + UPDATE:
                    with world.together(), service.gate.alone():
                        service.update(draw)
                    done["parameters updated"] += 1
                else:
                    # Mostly a few shapes, which are captured; sometimes one of many, which displace each other.
                    rows = draw.choice((1, 8, 16)) if draw.random() < 0.9 else draw.randint(2, ROWS)
                    x = torch.randn(rows, SIZE, device=device, generator=numbers)
                    with world.together(), service.gate.together():
                        found, expected = service.call(x), service.model(x)
                        off = float((found - expected).abs().max())
                    done["calls"] += 1
                    if not off <= 1e-3:
                        errors.append(f"thread {seed}: {type(service.model).__name__}, {rows} rows: off by {off}")
            except Exception:
                errors.append(f"thread {seed}: {traceback.format_exc()}")


def reserved_by() -> list[dict[str, Any]]:
    """What the allocator holds in the end, by kind of pool and size of segment: the first twenty by bytes."""
    found: dict[tuple[str, int], Counter[str]] = {}
    for segment in torch.cuda.memory_snapshot():
        pool = "default" if tuple(segment["segment_pool_id"]) == (0, 0) else "graphs"
        row = found.setdefault((pool, segment["total_size"]), Counter())
        row.update(segments=1, bytes=segment["total_size"], in_use=segment["allocated_size"])
    ordered = sorted(found.items(), key=lambda item: -item[1]["bytes"])
    return [{"pool": pool, "segment": size, **row} for (pool, size), row in ordered[:20]]


def flat(samples: list[int]) -> bool:
    """True if the last third never needs more than the two before, but for one byte in fifty."""
    start = 2 * len(samples) // 3
    return not samples or max(samples[start:]) <= 1.02 * max(samples[:start], default=0)


def soak(minutes: float, threads: int, device: str) -> dict[str, Any]:
    """Run it, and say what happened."""
    done: Counter[str] = Counter()
    errors: list[str] = []
    reserved: list[int] = []
    world = Gate()
    with collect() as records, torch.no_grad():
        services = [Service(make, device) for make in (Branches, Attention, Convolutions) for _ in range(2)]
        settle(device)
        started = time.monotonic()
        until = started + 60 * minutes
        running = [
            threading.Thread(
                target=contextvars.copy_context().run, args=(turns, services, world, seed, until, done, errors)
            )
            for seed in range(threads)
        ]
        for thread in running:
            thread.start()
        with Progress(disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("soak", total=60 * minutes)
            while any(thread.is_alive() for thread in running):
                time.sleep(min(5.0, minutes * 60 / 20))
                if device == "cuda":
                    reserved.append(torch.cuda.memory_reserved())
                progress.update(task, completed=time.monotonic() - started, description=f"{done['calls']} calls")
        for thread in running:
            thread.join()
    return {
        "minutes": round((time.monotonic() - started) / 60, 2),
        "threads": threads,
        "done": dict(sorted(done.items())),
        "graphs": len(_all(records)),
        "replays": sum(r.replays for r in _all(records)),
        "other_calls": sum(r.other_calls for r in _all(records)),
        "fallbacks": dict(Counter(step.reason.value for r in _all(records) for step in r.fallbacks)),
        "reserved_bytes": reserved,
        "memory_flat": flat(reserved),
        "reserved_by": reserved_by() if device == "cuda" else [],
        "errors": errors[:20],
    }


def _all(records: list[GraphRecord]) -> list[GraphRecord]:
    return list({id(r): r for r in records}.values())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--commit", help="commit the code is at, where git cannot tell")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    chosen = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logging.basicConfig(level=logging.ERROR)
    found = {
        "schema": "opara.soak/1",
        **environment(chosen.commit, "python -m tests.soak"),
        "opara": __version__,
        **soak(chosen.minutes, chosen.threads, device),
    }
    text = json.dumps(found, indent=1)
    if chosen.out:
        chosen.out.write_text(text + "\n")
    print(text)
    gc.collect()
    return int(bool(found["errors"]) or not found["memory_flat"])


if __name__ == "__main__":
    raise SystemExit(main())
