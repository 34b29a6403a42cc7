"""A GPU as plain numbers: per-SM limits, caches, memory bandwidth and peak arithmetic rates.

Takes: a preset's name, or the properties torch reports for the GPU at hand. Gives: a frozen `DeviceSpec`. Must not
change: anything. Importing it loads no torch and touches no GPU, and the presets are immutable.

Where the numbers come from (all NVIDIA):
  per-SM limits   CUDA C++ programming guide, "Technical Specifications per Compute Capability"
  allocation      units per warp and block: `cuda_occupancy.h` of the CUDA toolkit
  A100            "NVIDIA A100 Tensor Core GPU" datasheet (SXM 80GB); "NVIDIA A100 Tensor Core GPU Architecture"
  H100            "NVIDIA H100 Tensor Core GPU Architecture" whitepaper (SXM5)
  H200            "NVIDIA H200 Tensor Core GPU" datasheet (SXM); arithmetic is the H100's, which the datasheet prints
                  rounded. It does not give the L2: 60 MiB is what the driver reports
  L4              "NVIDIA L4 Tensor Core GPU" datasheet; L2 from "NVIDIA Ada GPU Architecture" v2
  RTX 4090        "NVIDIA Ada GPU Architecture" whitepaper; tensor rates are those with FP32 accumulation
Rates are DENSE: where a datasheet prints only the figure with 2:4 sparsity (L4), half of it stands here. Each is the
fastest path for its type (tensor cores where they take it), but float32 is plain FP32, beside tf32. Ada's float64 is
1/64 of its float32, as its whitepaper says.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

Rates = tuple[tuple[str, float], ...]
_KIB, _MIB = 1024, 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One GPU. Sizes are bytes, rates are per second, registers are 32-bit; `estimated` marks guessed rates."""

    name: str
    compute_capability: tuple[int, int]
    sms: int
    warp_size: int = 32
    max_threads_per_sm: int
    max_threads_per_block: int = 1024
    max_blocks_per_sm: int
    registers_per_sm: int = 65536
    max_registers_per_block: int = 65536
    max_registers_per_thread: int = 255
    register_allocation_unit: int = 256
    warp_allocation_granularity: int = 4
    shared_memory_per_sm: int
    max_shared_memory_per_block: int
    reserved_shared_memory_per_block: int = 1024
    shared_memory_allocation_unit: int = 128
    l2_bytes: int
    memory_bandwidth: float
    peak_flops: Rates
    estimated: bool = False

    def __post_init__(self) -> None:
        if "float32" not in dict(self.peak_flops):
            raise ValueError(f"DeviceSpec.peak_flops: found {self.peak_flops}, accepted rates that name float32")

    def flops_per_second(self, dtype: str) -> float:
        """Peak dense FLOP/s for a dtype, with or without "torch."; a dtype the spec lacks computes at float32's rate.

        Right for types that run on the plain cores, low for a narrow type whose tensor rate is not published.
        """
        rates = dict(self.peak_flops)
        return rates.get(dtype.removeprefix("torch."), rates["float32"])

    def balance(self, dtype: str) -> float:
        """FLOP per byte of memory traffic at which computing and moving take equally long: the roofline's ridge."""
        return self.flops_per_second(dtype) / self.memory_bandwidth


# capability: (threads per SM, blocks per SM, KiB of shared memory per SM)
_LIMITS: Mapping[tuple[int, int], tuple[int, int, int]] = MappingProxyType(
    {
        (7, 0): (2048, 32, 96),
        (7, 5): (1024, 16, 64),
        (8, 0): (2048, 32, 164),
        (8, 6): (1536, 16, 100),
        (8, 7): (1536, 16, 164),
        (8, 9): (1536, 24, 100),
        (9, 0): (2048, 32, 228),
        (10, 0): (2048, 32, 228),
        (11, 0): (1536, 24, 228),
        (12, 0): (1536, 24, 100),
    }
)


def _spec(name: str, capability: tuple[int, int], sms: int, l2: int, bandwidth: float, peak: Rates) -> DeviceSpec:
    # A capability newer than the table is taken for its predecessor: capabilities of one major rarely differ.
    row = max((known for known in _LIMITS if known <= capability), default=min(_LIMITS))
    threads, blocks, shared_kib = _LIMITS[row]
    # Before Ampere the driver kept no shared memory for itself and allocated in 256-byte steps.
    reserved, unit = (_KIB, 128) if capability >= (8, 0) else (0, 256)
    return DeviceSpec(
        name=name,
        compute_capability=capability,
        sms=sms,
        max_threads_per_sm=threads,
        max_blocks_per_sm=blocks,
        shared_memory_per_sm=shared_kib * _KIB,
        max_shared_memory_per_block=shared_kib * _KIB - reserved,
        reserved_shared_memory_per_block=reserved,
        shared_memory_allocation_unit=unit,
        l2_bytes=l2,
        memory_bandwidth=bandwidth,
        peak_flops=peak,
    )


def _tera(*, float8: float | None = None, **rates: float) -> Rates:
    narrow = {} if float8 is None else {"float8_e4m3fn": float8, "float8_e5m2": float8}
    return tuple((dtype, rate * 1e12) for dtype, rate in {**rates, **narrow}.items())


_AMPERE = _tera(float32=19.5, tf32=156.0, float16=312.0, bfloat16=312.0, float64=19.5, int8=624.0)
_HOPPER = _tera(float32=66.9, tf32=494.7, float16=989.4, bfloat16=989.4, float64=66.9, int8=1978.9, float8=1978.9)
_L4 = _tera(float32=30.3, tf32=60.0, float16=121.0, bfloat16=121.0, float64=30.3 / 64, int8=242.5, float8=242.5)
_RTX = _tera(float32=82.6, tf32=82.6, float16=165.2, bfloat16=165.2, float64=82.6 / 64, int8=660.6, float8=330.3)

# Names are the driver's and compared whole: "NVIDIA L40S" contains "NVIDIA L4", and an H100 PCIe is another part.
PRESETS: Mapping[str, DeviceSpec] = MappingProxyType(
    {
        "A100": _spec("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 * _MIB, 2.039e12, _AMPERE),
        "H100": _spec("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 * _MIB, 3.352e12, _HOPPER),
        "H200": _spec("NVIDIA H200", (9, 0), 132, 60 * _MIB, 4.8e12, _HOPPER),
        "L4": _spec("NVIDIA L4", (8, 9), 58, 48 * _MIB, 0.3e12, _L4),
        "RTX 4090": _spec("NVIDIA GeForce RTX 4090", (8, 9), 128, 72 * _MIB, 1.008e12, _RTX),
    }
)


def preset(name: str) -> DeviceSpec:
    """The preset of that name; case, spaces, hyphens and underscores do not matter. ValueError for any other."""

    def plain(text: str) -> str:
        return text.casefold().translate({ord(mark): None for mark in " -_"})

    accepted = {plain(alias): key for key, spec in PRESETS.items() for alias in (key, spec.name)}
    near = difflib.get_close_matches(plain(name), accepted, n=1)
    if near == [plain(name)]:
        return PRESETS[accepted[near[0]]]
    hint = f"; did you mean {accepted[near[0]]!r}?" if near else ""
    raise ValueError(f"unknown device preset: found {name!r}, accepted {', '.join(map(repr, PRESETS))}{hint}")


def current_device_spec(device_index: int | None = None) -> DeviceSpec:
    """The spec of a CUDA device of this process (the current one by default); RuntimeError where there is none."""
    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        accepted = ", ".join(PRESETS)
        raise RuntimeError(f"no CUDA device to describe (torch finds none); use preset(name) with one of {accepted}")
    index = torch.cuda.current_device() if device_index is None else device_index
    return spec_from_properties(torch.cuda.get_device_properties(index))


def spec_from_properties(properties: Any) -> DeviceSpec:
    """A spec from `torch.cuda.get_device_properties`: limits as reported, rates from the preset.

    A part without a preset is `estimated`: arithmetic rates are those of the most similar preset per SM, bandwidth is
    memory clock times bus width (two transfers a clock) where both are reported, else the preset's per SM.
    """
    name, sms = str(properties.name), int(properties.multi_processor_count)
    capability = (int(properties.major), int(properties.minor))
    threads = int(properties.max_threads_per_multi_processor)

    def read(field: str, otherwise: int) -> int:  # older releases of torch lack some fields
        return int(getattr(properties, field, 0)) or otherwise

    def unlikeness(known: DeviceSpec) -> tuple[bool, bool, int, int]:
        # Threads per SM tells data-centre SMs from graphics SMs, which sets tensor rates more than the generation.
        apart = abs(10 * (known.compute_capability[0] - capability[0]) + known.compute_capability[1] - capability[1])
        return known.name != name, known.max_threads_per_sm != threads, apart, abs(known.sms - sms)

    closest = min(PRESETS.values(), key=unlikeness)
    estimated = (closest.name, closest.sms) != (name, sms)
    bandwidth, peak = closest.memory_bandwidth, closest.peak_flops
    if estimated:
        scale = sms / closest.sms
        by_clock = 2.0 * read("memory_clock_rate", 0) * 1000 * read("memory_bus_width", 0) / 8
        bandwidth, peak = by_clock or bandwidth * scale, tuple((dtype, rate * scale) for dtype, rate in peak)
    table = _spec(name, capability, sms, closest.l2_bytes, bandwidth, peak)
    return replace(
        table,
        warp_size=read("warp_size", table.warp_size),
        max_threads_per_sm=threads,
        max_threads_per_block=read("max_threads_per_block", table.max_threads_per_block),
        registers_per_sm=read("regs_per_multiprocessor", table.registers_per_sm),
        shared_memory_per_sm=read("shared_memory_per_multiprocessor", table.shared_memory_per_sm),
        max_shared_memory_per_block=read("shared_memory_per_block_optin", table.max_shared_memory_per_block),
        l2_bytes=read("L2_cache_size", table.l2_bytes),
        estimated=estimated,
    )
