"""What `doctor` looks at: facts about this machine, and a trial run of the backend on each device.

Takes: the installed packages and devices. Gives: `Finding`s. Must not change: anything but Inductor's cache, which the
trial's programs enter. Never raises: what goes wrong is a finding.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OK, NOTE, BROKEN = "ok", "note", "broken"

OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Finding:
    """One thing looked at. status: ok, note (worth knowing, works all the same) or broken. remedy: what to do."""

    name: str
    status: str
    text: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """All of them, one by one, the trial runs last."""
    yield _python()
    yield _system()
    torch = _torch()
    yield torch
    if torch.status == BROKEN:
        return
    yield from _devices()
    yield _triton()
    yield _bindings()
    yield _compiler()
    yield _entry_point()
    yield _switched_off()
    yield _cache()
    for device in _places():
        yield trial(device)


def _python() -> Finding:
    return Finding("python", OK, f"{platform.python_version()} ({sys.executable})")


def _system() -> Finding:
    text = f"{platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("system", NOTE, text, "only Linux is tested")
    return Finding("system", OK, text)


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch() -> Finding:
    wanted = ".".join(map(str, OLDEST_TORCH))
    try:
        import torch
    except Exception as error:
        return Finding("torch", BROKEN, f"does not import: {_words(error)}", f"install torch {wanted} or later")
    build = "built for the CPU"
    if torch.version.hip:
        return Finding("torch", NOTE, f"{torch.__version__}, built for ROCm", "only NVIDIA GPUs are supported")
    if torch.version.cuda:
        build = f"built for CUDA {torch.version.cuda}"
    numbers = tuple(int(n) for n in re.findall(r"\d+", str(torch.__version__))[:2])
    if numbers < OLDEST_TORCH:
        return Finding("torch", BROKEN, f"{torch.__version__}, {build}", f"install torch {wanted} or later")
    return Finding("torch", OK, f"{torch.__version__}, {build}")


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available()) and not torch.version.hip


def _places() -> tuple[str, ...]:
    """Devices to try: every GPU, or the CPU where there is none."""
    import torch

    return tuple(f"cuda:{i}" for i in range(torch.cuda.device_count())) if _has_gpu() else ("cpu",)


def _devices() -> Iterator[Finding]:
    import torch

    driver = _driver()
    if not _has_gpu():
        text = "no CUDA device: models run on the CPU, in order, without capture, no faster than Inductor"
        if driver is None:
            yield Finding("device", OK, text)
        elif torch.version.cuda is None:
            remedy = "install a torch built for CUDA to use the GPU"
            yield Finding("device", NOTE, f"driver {driver}, but this torch sees no GPU; {text}", remedy)
        else:
            remedy = "see that the driver is recent enough for this torch, and CUDA_VISIBLE_DEVICES"
            yield Finding("device", BROKEN, f"driver {driver}, but torch {torch.version.cuda} sees no GPU", remedy)
        return
    yield Finding("driver", OK, driver or "version unknown (no nvidia-smi)")
    for index in range(torch.cuda.device_count()):
        try:
            facts = torch.cuda.get_device_properties(index)
        except Exception as error:
            yield Finding(f"cuda:{index}", BROKEN, _words(error), "see that the GPU is free and the driver works")
            continue
        text = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.multi_processor_count} SMs, "
            f"{facts.total_memory / 2**30:.0f} GiB"
        )
        if (facts.major, facts.minor) < (7, 0):
            yield Finding(f"cuda:{index}", BROKEN, text, "Triton needs compute capability 7.0 or later")
        else:
            yield Finding(f"cuda:{index}", OK, text)


def _driver() -> str | None:
    """Version of the NVIDIA driver, where nvidia-smi tells."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _triton() -> Finding:
    version = _version_of("triton") or _version_of("pytorch-triton")
    if version is not None:
        return Finding("triton", OK, version)
    if _has_gpu():
        return Finding("triton", BROKEN, "not installed", "pip install the triton that your torch asks for")
    return Finding("triton", OK, "not installed; only a GPU needs it")


def _bindings() -> Finding:
    version = _version_of("cuda-bindings")
    if version is not None:
        return Finding("cuda-bindings", OK, version)
    if _has_gpu():
        text = "not installed: what kernels demand of the GPU is unknown, they are ordered by duration"
        return Finding("cuda-bindings", NOTE, text, "pip install cuda-bindings of your CUDA's version")
    return Finding("cuda-bindings", OK, "not installed; only a GPU needs it")


def _compiler() -> Finding:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is not None:
        return Finding("C++ compiler", OK, path)
    text, remedy = f"{name!r} is nowhere on PATH", "install g++, or name yours in the environment variable CXX"
    if _has_gpu():
        return Finding("C++ compiler", NOTE, f"{text}; needed for what runs on the CPU", remedy)
    return Finding("C++ compiler", BROKEN, f"{text}; Inductor compiles for the CPU with one", remedy)


def _entry_point() -> Finding:
    """Whether `backend="opara"` leads here."""
    remedy = "install this package into this Python: pip install . in a checkout"
    found = [e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "opara"]
    if not found:
        return Finding("entry point", BROKEN, "torch finds no backend called opara", remedy)
    try:
        loaded = found[0].load()
        from opara_backend.backend import opara
    except Exception as error:
        return Finding("entry point", BROKEN, f"{found[0].value} does not load: {_words(error)}", remedy)
    if loaded is not opara:
        return Finding("entry point", BROKEN, f"another package's: {found[0].value}", "uninstall that package")
    return Finding("entry point", OK, f'torch.compile(model, backend="opara") is {found[0].value}')


def _switched_off() -> Finding:
    """Environment switches with which torch.compile compiles nothing."""
    names = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_FORCE_DISABLE_CACHES")
    found = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name, "0") not in ("", "0")]
    if not found:
        return Finding("environment", OK, "no switch that turns compilation or caches off")
    status = NOTE if all("CACHES" in name for name in found) else BROKEN
    return Finding("environment", status, ", ".join(found), "unset it, or models run uncompiled or compile every time")


def _cache() -> Finding:
    from opara_backend.commands.cache import survey
    from opara_backend.commands.console import size

    try:
        found = survey()
    except Exception as error:
        return Finding("cache", BROKEN, _words(error), "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written")
    text = f"{found.location}, {size(found.nbytes)}; of this backend {len(found.modules)} graphs"
    if not os.access(found.location, os.W_OK):
        return Finding("cache", BROKEN, f"{text}; cannot be written", "set TORCHINDUCTOR_CACHE_DIR to another folder")
    return Finding("cache", OK, text)


def trial(device: str) -> Finding:
    """Compile a small branchy model on `device`, call it three times, compare with eager, and say how it ran."""
    name = f"trial on {device}"
    try:
        agrees, records, counted = _run_trial(device)
    except Exception as error:
        return Finding(name, BROKEN, _words(error), "nothing compiles here; a broken line above may say why")
    if not agrees:
        return Finding(name, BROKEN, "the compiled model disagrees with eager", "please report this")
    steps = [step for record in records for step in record.fallbacks]
    if steps:
        return Finding(name, BROKEN, "; ".join(f"{s.reason.value}: {s.detail}" for s in steps), steps[0].reason.remedy)
    if counted:
        from opara_backend.fallback import FallbackReason

        return Finding(name, BROKEN, ", ".join(counted), FallbackReason(counted[0]).remedy)
    plans = [planned for record in records for planned in record.plans.values()]
    if not plans:
        return Finding(name, BROKEN, "torch.compile compiled nothing", "see the line on the environment above")
    plan, captured = plans[0]
    what = f"{len(plan.graph)} kernels on {plan.schedule.streams} streams, agrees with eager"
    if captured:
        return Finding(name, OK, f"{what}; captured in a CUDA Graph")
    if device == "cpu":
        return Finding(name, OK, f"{what}; runs in order, as all does on a CPU")
    return Finding(name, BROKEN, f"{what}; not captured", "please report this")


def _run_trial(device: str) -> tuple[bool, list[Any], list[str]]:
    """Whether it agreed with eager, the records of its graphs, and the fallback reasons counted."""
    import torch

    from opara_backend import upstream
    from opara_backend.backend import opara
    from opara_backend.report.record import collect

    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([branch(x).relu() for branch in self.branches], 1).sum(1)

    before = dict(upstream.counters["opara"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Branches().eval().to(device), torch.randn(8, 64).to(device)
    with torch.inference_mode(), collect() as records:
        compiled = torch.compile(model, backend=opara)  # the function: its name is another check's business
        found = [compiled(x) for _ in range(3)]
        expected = model(x)
    # Inductor may round a GPU's float32 as tf32 where the user's settings do.
    agrees = all(torch.allclose(y, expected, rtol=1e-2, atol=1e-2) for y in found)
    counted = [reason for reason, n in upstream.counters["opara"].items() if n > before.get(reason, 0)]
    return agrees, records, counted


def _words(error: BaseException) -> str:
    """The first lines of an error: torch wraps another's words in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__
