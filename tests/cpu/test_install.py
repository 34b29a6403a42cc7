"""What installing and importing the package does: Dynamo finds the backend by name, and nothing else happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import opara_backend

Run = Callable[..., Any]


def test_dynamo_lists_and_uses_the_backend_without_any_import(run_python: Run) -> None:
    found = run_python("""
import json, sys
import torch

listed = torch._dynamo.list_backends()
early = [m for m in sys.modules if m.startswith("opara_backend")]
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
compiled = torch.compile(model, backend="opara")
x = torch.ones(2, 8)
with torch.inference_mode():
    right = all(torch.allclose(compiled(x), model(x), rtol=1e-4, atol=1e-4) for _ in range(3))
from opara_backend.execution.runtime import Runtime  # was used, or would be no good test
import gc
runtimes = [r for r in gc.get_objects() if type(r) is Runtime]
print(json.dumps([listed, early, right, [len(r.record.plans) for r in runtimes]]))
""")
    listed, early, right, plans = found
    assert "opara" in listed
    assert "inductor" in listed
    assert early == []
    assert right
    assert plans == [1]


def test_threads_may_name_the_backend_at_once_behind_one_that_did(run_python: Run) -> None:
    """As docs/serving.md says; without the first, torch's registry refuses most of them."""
    found = run_python("""
import json, sys, threading
import torch

first = torch.compile(torch.nn.Linear(4, 4), backend="opara")
sys.setswitchinterval(1e-6)
together, wrong = threading.Barrier(8), []

def compile():
    together.wait()
    try:
        torch.compile(torch.nn.Linear(4, 4), backend="opara")
    except BaseException as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=compile) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps(wrong))
""")
    assert found == []


def test_importing_has_no_side_effects(run_python: Run) -> None:
    """Measured after torch, which takes seconds by itself; half a second is generous for a slow machine."""
    found = run_python("""
import json, logging, sys, time
import torch

before = set(sys.modules)
state = lambda: (torch.compile, sys.excepthook, list(logging.getLogger().handlers), logging.root.manager.disable)
old = state()
start = time.perf_counter()
import opara_backend
seconds = time.perf_counter() - start
loaded = sorted(set(sys.modules) - before)
print(json.dumps([seconds, loaded, state() == old, torch.cuda.is_initialized()]))
""")
    seconds, loaded, unchanged, cuda = found
    assert seconds < 0.5
    assert [m for m in loaded if m.startswith(("torch._inductor", "torch._dynamo", "torch._functorch", "triton"))] == []
    assert unchanged
    assert not cuda


def test_importing_and_compiling_change_no_setting_of_inductor(run_python: Run) -> None:
    """Nor what stock Inductor generates: its wrapper code generator is back in its place."""
    found = run_python("""
import json
import torch
import torch._inductor.config as config
from torch._inductor.codegen.common import device_codegens, init_backend_registration

init_backend_registration()
before, codegens = config.get_config_copy(), dict(device_codegens)
import opara_backend
compiled = torch.compile(lambda x: (x @ x) @ x, backend="opara", options={"max_fusion_size": 3})
with torch.no_grad():
    compiled(torch.ones(2, 2))
after = config.get_config_copy()
print(json.dumps([[k for k in after if after[k] != before[k]], device_codegens == codegens]))
""")
    assert found == [[], True]


def test_graphs_and_schedules_need_no_torch(run_python: Run) -> None:
    found = run_python("""
import json, sys
import opara_backend.kernel_graph, opara_backend.memory
import opara_backend.scheduling.policies, opara_backend.scheduling.search
print(json.dumps([m for m in sys.modules if m.split(".")[0] in ("torch", "triton", "numpy", "sympy")]))
""")
    assert found == []


def test_the_backend_is_callable_by_itself(run_python: Run) -> None:
    """The function and its name lead to the same place."""
    found = run_python("""
import json
import torch
from opara_backend.backend import opara
from opara_backend.report.record import collect

with torch.no_grad(), collect() as records:
    for backend in (opara, "opara"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: (x @ x) @ x, backend=backend)
        right = [compiled(torch.eye(3)).equal(torch.eye(3)) for _ in range(2)]
print(json.dumps([right, [len(r.plans) for r in records]]))
""")
    assert found == [[True, True], [1, 1]]


def test_names_are_public() -> None:
    assert all(hasattr(opara_backend, name) for name in opara_backend.__all__)
    assert opara_backend.__version__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="opera"):
        opara_backend.opera  # noqa: B018
