"""Presets, the numbers derived from them, and reading a spec from what torch reports. Needs neither torch nor a GPU."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opara_backend.profiling.device import (
    PRESETS,
    DeviceSpec,
    current_device_spec,
    preset,
    spec_from_properties,
)

KIB = 1024
H200_REPORTED = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "max_threads_per_multi_processor": 2048,
    "warp_size": 32,
    "max_threads_per_block": 1024,
    "regs_per_multiprocessor": 65536,
    "shared_memory_per_multiprocessor": 228 * KIB,
    "shared_memory_per_block_optin": 227 * KIB,
    "L2_cache_size": 60 * KIB * KIB,
    "memory_clock_rate": 3201000,
    "memory_bus_width": 6144,
}
OLD_TORCH_FIELDS = ("name", "major", "minor", "multi_processor_count", "max_threads_per_multi_processor")


def reported(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**H200_REPORTED, **changed})


@pytest.mark.parametrize(
    ("name", "capability", "sms", "threads", "blocks", "shared_kib", "l2_mib", "gigabytes", "float16_tera"),
    [
        ("A100", (8, 0), 108, 2048, 32, 164, 40, 2039, 312.0),
        ("H100", (9, 0), 132, 2048, 32, 228, 50, 3352, 989.4),
        ("H200", (9, 0), 132, 2048, 32, 228, 60, 4800, 989.4),
        ("L4", (8, 9), 58, 1536, 24, 100, 48, 300, 121.0),
        ("RTX 4090", (8, 9), 128, 1536, 24, 100, 72, 1008, 165.2),
    ],
)
def test_presets_hold_the_vendor_figures(
    name: str,
    capability: tuple[int, int],
    sms: int,
    threads: int,
    blocks: int,
    shared_kib: int,
    l2_mib: int,
    gigabytes: float,
    float16_tera: float,
) -> None:
    spec = preset(name)
    assert (spec.compute_capability, spec.sms) == (capability, sms)
    assert (spec.max_threads_per_sm, spec.max_blocks_per_sm) == (threads, blocks)
    assert spec.shared_memory_per_sm == shared_kib * KIB
    assert spec.max_shared_memory_per_block == (shared_kib - 1) * KIB
    assert spec.l2_bytes == l2_mib * KIB * KIB
    assert spec.memory_bandwidth == pytest.approx(gigabytes * 1e9)
    assert spec.flops_per_second("float16") == pytest.approx(float16_tera * 1e12)
    assert not spec.estimated


@pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS.keys())
def test_presets_are_sane(spec: DeviceSpec) -> None:
    assert spec.max_shared_memory_per_block + spec.reserved_shared_memory_per_block == spec.shared_memory_per_sm
    assert spec.max_threads_per_sm % spec.warp_size == 0
    assert spec.registers_per_sm % spec.warp_allocation_granularity == 0
    rates = [spec.flops_per_second(dtype) for dtype in ("float32", "tf32", "float16", "int8")]
    assert rates == sorted(rates), "a narrower type is never slower"
    assert spec.flops_per_second("bfloat16") == spec.flops_per_second("float16")
    hash(spec)


@pytest.mark.parametrize(("name", "dtype", "ridge"), [("H200", "float16", 206.1), ("A100", "float32", 9.56)])
def test_balance_is_the_ridge_of_the_roofline(name: str, dtype: str, ridge: float) -> None:
    assert preset(name).balance(dtype) == pytest.approx(ridge, abs=0.05)


def test_dtype_names_may_carry_the_torch_prefix() -> None:
    assert preset("H100").flops_per_second("torch.bfloat16") == preset("H100").flops_per_second("bfloat16")


def test_an_unknown_dtype_computes_at_the_rate_of_float32() -> None:
    assert preset("L4").flops_per_second("int32") == preset("L4").flops_per_second("float32")
    assert preset("A100").flops_per_second("float8_e4m3fn") == preset("A100").flops_per_second("float32")


def test_rates_without_float32_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        dataclasses.replace(preset("A100"), peak_flops=(("float16", 1e12),))


@pytest.mark.parametrize("alias", ["RTX 4090", "rtx4090", "rtx-4090", "RTX_4090", "NVIDIA GeForce RTX 4090"])
def test_a_preset_has_forgiving_names(alias: str) -> None:
    assert preset(alias) is PRESETS["RTX 4090"]


def test_an_unknown_preset_says_what_was_given_and_what_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"'foo'") as raised:
        preset("foo")
    assert all(repr(name) in str(raised.value) for name in PRESETS)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'RTX 4090'"):
        preset("RTX 4080")


def test_presets_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        PRESETS["A100"] = preset("H100")  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("A100").sms = 1  # type: ignore[misc]


def test_a_known_gpu_is_its_preset() -> None:
    assert spec_from_properties(reported()) == preset("H200")


def test_a_torch_that_reports_little_still_yields_the_preset() -> None:
    assert spec_from_properties(SimpleNamespace(**{k: H200_REPORTED[k] for k in OLD_TORCH_FIELDS})) == preset("H200")


def test_an_unknown_gpu_is_estimated_from_its_clock_and_the_nearest_preset() -> None:
    spec = spec_from_properties(reported(name="NVIDIA H100 PCIe", multi_processor_count=114))
    assert spec.estimated
    assert (spec.name, spec.sms) == ("NVIDIA H100 PCIe", 114)
    assert spec.memory_bandwidth == pytest.approx(2 * 3201e6 * 6144 / 8)
    assert spec.flops_per_second("float16") == pytest.approx(989.4e12 * 114 / 132)


@pytest.mark.parametrize("silent", ["memory_clock_rate", "memory_bus_width"])
def test_without_clock_or_bus_the_bandwidth_follows_the_sms(silent: str) -> None:
    spec = spec_from_properties(reported(name="slice", multi_processor_count=66, **{silent: 0}))
    assert spec.memory_bandwidth == pytest.approx(preset("H100").memory_bandwidth / 2)


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA L4 MIG 1g"])
def test_a_name_that_contains_a_preset_is_not_that_preset(name: str) -> None:
    ada = reported(name=name, major=8, minor=9, multi_processor_count=142, max_threads_per_multi_processor=1536)
    assert spec_from_properties(ada).estimated


def test_a_graphics_gpu_of_a_new_generation_resembles_a_graphics_gpu() -> None:
    spec = spec_from_properties(
        reported(name="new", major=12, multi_processor_count=128, max_threads_per_multi_processor=1536)
    )
    assert spec.peak_flops == preset("RTX 4090").peak_flops
    assert spec.max_blocks_per_sm == 24


def test_before_ampere_nothing_is_reserved_and_units_are_larger() -> None:
    turing = {"name": "RTX 2080 SUPER", "major": 7, "minor": 5, "multi_processor_count": 48}
    spec = spec_from_properties(SimpleNamespace(**turing, max_threads_per_multi_processor=1024))
    assert (spec.max_blocks_per_sm, spec.shared_memory_per_sm) == (16, 64 * KIB)
    assert (spec.reserved_shared_memory_per_block, spec.shared_memory_allocation_unit) == (0, 256)
    assert spec.max_shared_memory_per_block == 64 * KIB


@given(
    major=st.integers(3, 20),
    minor=st.integers(0, 9),
    sms=st.integers(1, 256),
    threads=st.sampled_from([1024, 1536, 2048]),
)
def test_any_gpu_gets_a_usable_spec(major: int, minor: int, sms: int, threads: int) -> None:
    part = {"name": "?", "major": major, "minor": minor}
    spec = spec_from_properties(
        SimpleNamespace(**part, multi_processor_count=sms, max_threads_per_multi_processor=threads)
    )
    assert spec.estimated
    assert spec.memory_bandwidth > 0
    assert spec.balance("float16") > 0
    assert 0 < spec.max_shared_memory_per_block <= spec.shared_memory_per_sm


def fake_torch(monkeypatch: pytest.MonkeyPatch, *, available: bool, cuda: str | None = "13.0") -> None:
    """Put a stand-in in torch's place: the real one takes seconds to import and sees no GPU here."""
    devices = (reported(), reported(name="other"))
    cuda_module = SimpleNamespace(
        is_available=lambda: available, current_device=lambda: 0, get_device_properties=lambda index: devices[index]
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda_module, version=SimpleNamespace(cuda=cuda)))


def test_the_current_device_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_torch(monkeypatch, available=True)
    assert current_device_spec() == preset("H200")
    assert current_device_spec(1).name == "other"


@pytest.mark.parametrize(("available", "cuda"), [(False, "13.0"), (False, None), (True, None)])
def test_without_cuda_there_is_no_current_device(
    monkeypatch: pytest.MonkeyPatch, available: bool, cuda: str | None
) -> None:
    fake_torch(monkeypatch, available=available, cuda=cuda)
    with pytest.raises(RuntimeError, match=r"no CUDA device.*H200"):
        current_device_spec()


def test_importing_the_profiling_modules_does_not_import_torch() -> None:
    program = "import sys, opara_backend.profiling.device, opara_backend.profiling.occupancy; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert "opara_backend.profiling.occupancy" in loaded
    assert "torch" not in loaded
