"""A FastAPI server under concurrent load: many clients, one compiled model, every answer checked against eager.

    python examples/server.py [--device cuda] [--small] [--clients 16] [--requests 200]
    python examples/server.py --serve [--port 8000]

The load goes over a socket of this machine (127.0.0.1) where uvicorn is installed, else straight into the
application. Needs fastapi and httpx: pip install 'opara-backend[examples]'.

What matters: warm up before the first request, one thread doing so; pad to a few batch sizes, each of which is then
one captured graph; call the model from as many threads as there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import statistics
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import torch
from shared import describe, parser, warm_up
from torch import Tensor, nn

from opara_backend.report.record import collect

try:
    import httpx
    from fastapi import FastAPI, HTTPException
    from pydantic import BaseModel
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install 'opara-backend[examples]'") from error

SIZES = (1, 2, 4, 8)  # batches are padded to one of these
FEATURES = 32


class Scorer(nn.Module):
    """Several experts side by side, and their mean weighed by a gate."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, hidden), nn.GELU(), nn.Linear(hidden, 4)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        answers = torch.stack([expert(x) for expert in self.experts], 1)
        return (answers * self.gate(x).softmax(1).unsqueeze(-1)).sum(1)


class Request(BaseModel):
    """Up to eight rows of features."""

    rows: list[list[float]]


class Answer(BaseModel):
    """Four scores for each row."""

    scores: list[list[float]]


def application(model: Callable[[Tensor], Tensor], device: str) -> FastAPI:
    """The server; compiles and captures every batch size before it takes requests."""

    def predict(rows: list[list[float]]) -> Tensor:
        size = next(s for s in SIZES if s >= len(rows))
        x = torch.zeros(size, FEATURES)
        x[: len(rows)] = torch.tensor(rows)
        with torch.inference_mode():  # of this thread
            return model(x.to(device))[: len(rows)].cpu()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with collect() as records:
            for size in SIZES:
                warm_up(lambda size=size: predict([[0.0] * FEATURES] * size), device)
        describe(records)
        yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/score")
    def score(request: Request) -> Answer:  # no coroutine: FastAPI calls it from a thread of its pool
        if not 0 < len(request.rows) <= SIZES[-1] or any(len(row) != FEATURES for row in request.rows):
            raise HTTPException(422, f"1 to {SIZES[-1]} rows of {FEATURES} numbers are accepted")
        return Answer(scores=predict(request.rows).tolist())

    return app


@contextlib.contextmanager
def socket_server(app: FastAPI) -> Iterator[str]:
    """The application served by uvicorn on a free port of 127.0.0.1."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def load(client: httpx.AsyncClient, rows: Sequence[Tensor], clients: int) -> tuple[list[Tensor], list[float]]:
    """Send every request, `clients` at a time: the answers in order, and seconds per request."""
    answers: list[Tensor] = [torch.empty(0)] * len(rows)
    seconds: list[float] = []
    todo = iter(range(len(rows)))

    async def one_client() -> None:
        for number in todo:  # shared: each takes the next one
            start = time.perf_counter()
            response = await client.post("/score", json={"rows": rows[number].tolist()})
            response.raise_for_status()
            seconds.append(time.perf_counter() - start)
            answers[number] = torch.tensor(response.json()["scores"])

    await asyncio.gather(*(one_client() for _ in range(clients)))
    return answers, seconds


async def load_through(app: FastAPI, rows: Sequence[Tensor], clients: int) -> tuple[list[Tensor], list[float]]:
    """The load without a socket."""
    transport = httpx.ASGITransport(app=app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await load(client, rows, clients)


async def load_over(address: str, rows: Sequence[Tensor], clients: int) -> tuple[list[Tensor], list[float]]:
    """The load over a socket."""
    async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
        return await load(client, rows, clients)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument("--requests", type=int, default=200)
    arguments.add_argument("--serve", action="store_true", help="serve until stopped, without load")
    arguments.add_argument("--port", type=int, default=8000)
    chosen = arguments.parse_args(argv)
    torch.manual_seed(0)
    eager = Scorer(*((3, 16) if chosen.small else (8, 1024))).to(chosen.device).eval()
    # Each batch size has a graph of its own: static shapes give the fastest kernels, and there are only a few.
    app = application(torch.compile(eager, backend="opara", dynamic=False), chosen.device)
    if chosen.serve:
        import uvicorn

        uvicorn.run(app, host="127.0.0.1", port=chosen.port)
        return 0
    rows = [torch.randn(1 + number % SIZES[-1], FEATURES) for number in range(chosen.requests)]
    start = time.perf_counter()
    if importlib.util.find_spec("uvicorn") is not None:
        with socket_server(app) as address:
            print(f"serving on {address}, warm after {time.perf_counter() - start:.1f} s")
            start = time.perf_counter()
            answers, seconds = asyncio.run(load_over(address, rows, chosen.clients))
    else:
        answers, seconds = asyncio.run(load_through(app, rows, chosen.clients))
    taken = time.perf_counter() - start
    with torch.inference_mode():
        for asked, found in zip(rows, answers, strict=True):
            torch.testing.assert_close(found, eager(asked.to(chosen.device)).cpu(), rtol=1e-2, atol=1e-3)
    print(f"{len(rows)} requests by {chosen.clients} clients: {len(rows) / taken:.0f} a second, all agree with eager")
    print(f"median latency {statistics.median(seconds) * 1e3:.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
