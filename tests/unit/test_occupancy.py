"""Occupancy against values worked out by hand from NVIDIA's rules, and properties that hold for every launch."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from opara_backend.profiling.device import PRESETS, DeviceSpec, preset
from opara_backend.profiling.occupancy import Launch, blocks_per_sm, gpu_share, limiter, occupancy, waves

KIB = 1024
SPECS = st.sampled_from(list(PRESETS.values()))
EXTENT = st.integers(1, 64)


def launch(threads: int, registers: int = 0, shared: int = 0, blocks: int = 1_000_000) -> Launch:
    return Launch((blocks, 1, 1), (threads, 1, 1), registers, 0, shared)


@st.composite
def launches(draw: st.DrawFn) -> Launch:
    block = draw(st.tuples(EXTENT, EXTENT, st.integers(1, 4)).filter(lambda dims: dims[0] * dims[1] * dims[2] <= 1024))
    grid = draw(st.tuples(st.integers(1, 4096), EXTENT, EXTENT))
    return Launch(
        grid, block, draw(st.integers(0, 255)), draw(st.integers(0, 48 * KIB)), draw(st.integers(0, 179 * KIB))
    )


def fits(candidate: Launch, spec: DeviceSpec) -> bool:
    try:
        return blocks_per_sm(candidate, spec) > 0
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("name", "threads", "registers", "shared", "blocks", "limit"),
    [
        # 8 warps of 1024 registers: 64 warp slots / 8, and 65536 registers allow as many; threads come first
        ("A100", 256, 32, 0, 8, "threads"),
        ("A100", 1024, 64, 0, 1, "registers"),
        # 168 * 32 = 5376 registers a warp; a quarter SM holds 16384 // 5376 = 3 warps, so 12 warps, 3 blocks of 4
        ("H100", 128, 168, 0, 3, "registers"),
        # 3 warps of 2048: 8 a quarter, 32 in all, 10 blocks: warps of a block need not come in fours
        ("H100", 96, 64, 0, 10, "registers"),
        # 33 registers cost 5 units of 256: 1280 a warp, 12 a quarter, 48 warps
        ("A100", 128, 33, 0, 12, "registers"),
        ("A100", 32, 16, 0, 32, "blocks"),
        ("RTX 4090", 32, 16, 0, 24, "blocks"),
        # 31 threads take a whole warp, 33 take two
        ("L4", 31, 16, 0, 24, "blocks"),
        ("L4", 513, 16, 0, 2, "threads"),
        # 48 KiB + 1 KiB reserved: 228 // 49 on Hopper, 164 // 49 on A100, 100 // 49 on Ada
        ("H200", 128, 32, 48 * KIB, 4, "shared memory"),
        ("A100", 128, 32, 48 * KIB, 3, "shared memory"),
        ("L4", 128, 32, 48 * KIB, 2, "shared memory"),
        # one byte more starts another unit of 128: 2 * (113 KiB + 128 B + 1 KiB) exceeds 228 KiB
        ("H200", 128, 32, 113 * KIB, 2, "shared memory"),
        ("H200", 128, 32, 113 * KIB + 1, 1, "shared memory"),
        # a 164 KiB tile of a matrix product
        ("H200", 128, 168, 164 * KIB, 1, "shared memory"),
        ("H200", 384, 168, 227 * KIB, 1, "registers"),
        ("A100", 1024, 0, 0, 2, "threads"),
    ],
)
def test_blocks_per_sm_worked_out_by_hand(
    name: str, threads: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    kernel = launch(threads, registers, shared)
    assert blocks_per_sm(kernel, preset(name)) == blocks
    assert limiter(kernel, preset(name)) == limit


def test_static_and_dynamic_shared_memory_count_alike() -> None:
    for static in (0, 17, 20 * KIB):
        kernel = Launch((1, 1, 1), (64, 1, 1), 32, static, 40 * KIB - static)
        assert kernel.shared_memory == 40 * KIB
        assert blocks_per_sm(kernel, preset("A100")) == 4


def test_before_ampere_an_unused_shared_memory_does_not_limit() -> None:
    bare = replace(preset("A100"), reserved_shared_memory_per_block=0, shared_memory_allocation_unit=256)
    assert limiter(launch(32, 16), bare) == "blocks"


@pytest.mark.parametrize(
    ("kernel", "resource", "found", "accepted"),
    [
        (launch(1025), "threads per block", 1025, 1024),
        (launch(32, 256), "registers per thread", 256, 255),
        # 29 warps are checked as 32: 32 * 2304
        (launch(29 * 32, 72), "registers per block", 73728, 65536),
        (launch(32, 32, 228 * KIB), "shared memory per block in bytes", 228 * KIB, 227 * KIB),
    ],
)
def test_a_launch_that_does_not_fit_says_why(kernel: Launch, resource: str, found: int, accepted: int) -> None:
    message = f"{resource}: found {found}, accepted at most {accepted}"
    for question in (blocks_per_sm, limiter, occupancy, waves, gpu_share):
        with pytest.raises(ValueError, match=message):
            question(kernel, preset("H200"))


@pytest.mark.parametrize(
    ("grid", "block", "registers", "shared", "field"),
    [
        ((0, 1, 1), (32, 1, 1), 0, 0, "grid"),
        ((1, 1, 1), (32, 0, 1), 0, 0, "block"),
        ((1, 1, 1), (32, 1, 1), -1, 0, "registers"),
        ((1, 1, 1), (32, 1, 1), 0, -1, "dynamic_shared"),
    ],
)
def test_a_launch_must_make_sense(
    grid: tuple[int, int, int], block: tuple[int, int, int], registers: int, shared: int, field: str
) -> None:
    with pytest.raises(ValueError, match=f"Launch.{field}: found"):
        Launch(grid, block, registers, 0, shared)


def test_a_small_grid_is_its_own_limit() -> None:
    small = launch(256, 32, blocks=132)
    assert blocks_per_sm(small, preset("H200")) == 8
    assert limiter(small, preset("H200")) == "grid"
    assert waves(small, preset("H200")) == pytest.approx(1 / 8)
    assert gpu_share(small, preset("H200")) == pytest.approx(1 / 8)
    assert limiter(launch(256, 32, blocks=8 * 132), preset("H200")) == "threads"


def test_the_share_is_that_of_the_scarcest_resource() -> None:
    half_of_each_sm = launch(128, 32, 113 * KIB, blocks=132)
    assert gpu_share(half_of_each_sm, preset("H200")) == pytest.approx(0.5)


def test_a_kernel_of_many_waves_demands_no_more_than_the_gpu() -> None:
    assert gpu_share(launch(256, 32, blocks=10**6), preset("A100")) == pytest.approx(1.0)
    # one block of 164 KiB an SM leaves the rest of the shared memory to others, however many wait
    assert gpu_share(launch(128, 32, 164 * KIB, blocks=10**6), preset("H200")) == pytest.approx(165 / 228)


def test_one_big_block_demands_less_than_many_small_ones() -> None:
    big, many = launch(1024, 64, blocks=1), launch(64, 32, blocks=2000)
    assert gpu_share(big, preset("H200")) < gpu_share(many, preset("H200"))


@given(launches(), SPECS)
def test_bounds(kernel: Launch, spec: DeviceSpec) -> None:
    assume(fits(kernel, spec))
    resident = blocks_per_sm(kernel, spec)
    assert 1 <= resident <= spec.max_blocks_per_sm
    assert resident * kernel.threads_per_block <= spec.max_threads_per_sm
    assert resident * kernel.shared_memory <= spec.shared_memory_per_sm
    assert resident * kernel.threads_per_block * kernel.registers <= spec.registers_per_sm
    assert 0 < occupancy(kernel, spec) <= 1
    assert 0 < gpu_share(kernel, spec) <= 1
    assert waves(kernel, spec) * resident * spec.sms == pytest.approx(kernel.blocks)
    assert (limiter(kernel, spec) == "grid") == (waves(kernel, spec) < 1)


@given(launches(), SPECS, st.integers(0, 64), st.integers(0, 32 * KIB))
def test_more_demand_never_admits_more_blocks(kernel: Launch, spec: DeviceSpec, registers: int, shared: int) -> None:
    heavier = replace(kernel, registers=kernel.registers + registers, dynamic_shared=kernel.dynamic_shared + shared)
    assume(fits(heavier, spec))
    assert blocks_per_sm(heavier, spec) <= blocks_per_sm(kernel, spec)


@given(launches(), SPECS, st.integers(1, 100))
def test_more_blocks_never_take_a_smaller_share(kernel: Launch, spec: DeviceSpec, times: int) -> None:
    assume(fits(kernel, spec))
    wider = replace(kernel, grid=(kernel.grid[0] * times, *kernel.grid[1:]))
    assert gpu_share(wider, spec) >= gpu_share(kernel, spec)


@given(launches(), SPECS)
def test_how_threads_and_blocks_are_laid_out_does_not_matter(kernel: Launch, spec: DeviceSpec) -> None:
    assume(fits(kernel, spec))
    flat = replace(kernel, grid=(kernel.blocks, 1, 1), block=(1, 1, kernel.threads_per_block))
    assert (blocks_per_sm(flat, spec), gpu_share(flat, spec)) == (blocks_per_sm(kernel, spec), gpu_share(kernel, spec))
