"""Our occupancy rules against the driver's own answer, for kernels that differ in registers and shared memory.

The kernels are compiled here with NVRTC and never launched. What the driver reports of each (registers, static shared
memory) becomes a `Launch`; both sides then say how many of its blocks one SM holds. 0 from the driver means that the
launch does not fit, for which we raise ValueError.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from opara_backend.profiling.device import DeviceSpec, current_device_spec
from opara_backend.profiling.occupancy import Launch, blocks_per_sm

KIB = 1024
BLOCK_SIZES = (1, 31, 32, 33, 64, 96, 128, 160, 192, 256, 288, 384, 512, 640, 768, 928, 1000, 1024)
DYNAMIC_SHARED = (0, 1, 127, 128, 129, *(size * KIB for size in (1, 4, 8, 15, 16, 24, 32, 37, 47, 48)))
# Sizes above 48 KiB need an opt-in, which the fixture gives; those the device lacks are left out.
OPT_IN_SHARED = tuple(size * KIB + extra for size in (49, 64, 75, 99, 112, 113, 163, 164, 226, 227) for extra in (0, 1))
# (values held in registers, floats of static shared memory): the first decides how many registers a kernel takes, the
# compiler adds some of its own, so the driver is asked for the number.
VARIANTS = (
    *((values, 0) for values in (1, 16, 24, 32, 48, 64, 80, 112, 144, 176, 208, 224)),
    *((32, floats) for floats in (1, 256, 4353, 12288)),
)

# Every value is loaded before the barrier and used after it, in another order, so that all of them live at once.
# Shared memory is read, so that it is not optimised away.
SOURCE = """
extern "C" __global__ void probe(float *out, const float *in, int n) {
#if STATIC_FLOATS > 0
    __shared__ float tile[STATIC_FLOATS];
    tile[threadIdx.x % STATIC_FLOATS] = in[threadIdx.x];
#endif
    extern __shared__ float scratch[];
    float values[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; ++i) values[i] = in[i * n + threadIdx.x];
    __syncthreads();
    float sum = n > 0 ? 0.0f : scratch[threadIdx.x];
#pragma unroll
    for (int i = VALUES - 1; i >= 0; --i) sum = sum * values[i] + values[(i * 7) % VALUES];
#if STATIC_FLOATS > 0
    sum += tile[(threadIdx.x * 3) % STATIC_FLOATS];
#endif
    out[threadIdx.x] = sum;
}
"""


def missing() -> str | None:
    """What this test lacks on this machine, or None."""
    try:
        import torch

        importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        return str(error)
    return None if torch.cuda.is_available() and torch.version.cuda else "no CUDA device"


MISSING = missing()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]


def call(result: tuple[Any, ...]) -> Any:
    """The value of a cuda.bindings call, if it has one: the status comes first, and any but success fails the test."""
    status, *values = result
    assert status.value == 0, f"CUDA call failed: {status!r}"
    return values[0] if values else None


def compiled(options: tuple[str, ...]) -> bytes:
    """A cubin of the probe kernel. Needs NVRTC, no device."""
    nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    program = call(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"probe.cu", 0, [], []))
    flags = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * call(nvrtc.nvrtcGetProgramLogSize(program))
        call(nvrtc.nvrtcGetProgramLog(program, log))
        pytest.fail(log.decode())
    cubin: bytes = b" " * call(nvrtc.nvrtcGetCUBINSize(program))
    call(nvrtc.nvrtcGetCUBIN(program, cubin))
    call(nvrtc.nvrtcDestroyProgram(program))
    return cubin


@pytest.fixture(scope="module")
def spec() -> DeviceSpec:
    """The device at hand; its primary context becomes current, which the driver calls below need."""
    import torch

    torch.zeros(1, device="cuda")
    return current_device_spec()


@pytest.fixture(scope="module")
def functions(spec: DeviceSpec) -> Iterator[list[tuple[Any, int, int]]]:
    """(function, registers, static shared memory) of each variant, free to use all shared memory there is."""
    driver = importlib.import_module("cuda.bindings.driver")
    attribute = driver.CUfunction_attribute
    major, minor = spec.compute_capability
    modules, found = [], []
    for values, floats in VARIANTS:
        cubin = compiled((f"-arch=sm_{major}{minor}", f"-DVALUES={values}", f"-DSTATIC_FLOATS={floats}"))
        module = call(driver.cuModuleLoadData(cubin))
        modules.append(module)
        function = call(driver.cuModuleGetFunction(module, b"probe"))
        registers = call(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, function))
        static = call(driver.cuFuncGetAttribute(attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function))
        for name, value in (
            (attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, spec.max_shared_memory_per_block - static),
            # Per cent of the L1 / shared memory an SM has: without it the driver may weigh L1 against occupancy.
            (attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
        ):
            call(driver.cuFuncSetAttribute(function, name, value))
        found.append((function, registers, static))
    yield found
    for module in modules:
        call(driver.cuModuleUnload(module))


def ours(kernel: Launch, spec: DeviceSpec) -> int:
    try:
        return blocks_per_sm(kernel, spec)
    except ValueError:
        return 0


def test_blocks_per_sm_is_what_the_driver_says(functions: list[tuple[Any, int, int]], spec: DeviceSpec) -> None:
    driver = importlib.import_module("cuda.bindings.driver")
    differences = []
    for function, registers, static in functions:
        sizes = [s for s in (*DYNAMIC_SHARED, *OPT_IN_SHARED) if s + static <= spec.max_shared_memory_per_block]
        for threads in BLOCK_SIZES:
            for dynamic in sizes:
                theirs = call(driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, dynamic))
                kernel = Launch((1, 1, 1), (threads, 1, 1), registers, static, dynamic)
                if ours(kernel, spec) != theirs:
                    differences.append((kernel, ours(kernel, spec), theirs))
    assert not differences, f"{len(differences)} differ; (launch, ours, the driver's): {differences[:5]}"


def test_the_kernels_differ(functions: list[tuple[Any, int, int]]) -> None:
    registers = {count for _, count, _ in functions}
    assert len(registers) >= 8, f"the comparison above is only as wide as its kernels: {sorted(registers)}"
    assert max(registers) > 200, sorted(registers)
    assert min(registers) < 40, sorted(registers)
    assert len({static for _, _, static in functions}) == 5


def test_the_spec_is_what_the_driver_says(spec: DeviceSpec) -> None:
    import torch

    driver = importlib.import_module("cuda.bindings.driver")
    device = call(driver.cuDeviceGet(torch.cuda.current_device()))
    for attribute, value in (
        ("MULTIPROCESSOR_COUNT", spec.sms),
        ("WARP_SIZE", spec.warp_size),
        ("MAX_THREADS_PER_BLOCK", spec.max_threads_per_block),
        ("MAX_THREADS_PER_MULTIPROCESSOR", spec.max_threads_per_sm),
        ("MAX_BLOCKS_PER_MULTIPROCESSOR", spec.max_blocks_per_sm),
        ("MAX_REGISTERS_PER_BLOCK", spec.max_registers_per_block),
        ("MAX_REGISTERS_PER_MULTIPROCESSOR", spec.registers_per_sm),
        ("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR", spec.shared_memory_per_sm),
        ("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", spec.max_shared_memory_per_block),
        ("RESERVED_SHARED_MEMORY_PER_BLOCK", spec.reserved_shared_memory_per_block),
        ("L2_CACHE_SIZE", spec.l2_bytes),
    ):
        name = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{attribute}")
        assert call(driver.cuDeviceGetAttribute(name, device)) == value, attribute
