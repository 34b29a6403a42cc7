"""The tables that README and docs show say what the rows say, each figure once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.report import batches, gaps, host, lowerings, markdown, memory, options, policies, searches
from bench.samples import ABOUT, Results, Row, Samples
from bench.summary import case_table

ABOUT_TEST = {**dict.fromkeys(ABOUT, "x"), "commit": "abc1234"}
MIB = 2**20


def row(backend: str, ms: float, batch: int = 1, model: str = "tiny", **more: Any) -> Row:
    seconds = (ms * 1e-3,) * 3
    made = Row(model, "float16", batch, backend, Samples(seconds, (2 * ms * 1e-3,), (3 * ms * 1e-3,)), 0.0, None)
    return replace(made, **more)


def cells(text: str, name: str) -> list[str]:
    """The row of a table whose first cell is `name`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def results(*rows: Row) -> Results:
    return Results(ABOUT_TEST, rows)


PAIR = (row("reduce-overhead", 2.0), row("opara", 1.0, kernels=7, streams=3))


def test_speed_ups_by_batch_and_their_mean() -> None:
    more = [row("reduce-overhead", 3.0, 8), row("opara", 2.0, 8)]
    other = [row("reduce-overhead", 8.0, model="large"), row("opara", 1.0, model="large")]
    text = batches(results(*PAIR, *more, *other))
    assert cells(text, "tiny float16") == ["2.00x", "1.50x"]
    assert cells(text, "large float16") == ["8.00x", ""]
    assert cells(text, "geometric mean") == ["**4.00x** of 2", "**1.50x** of 1"]
    assert "commit abc1234, 1 process a case" in text
    mean = cells(markdown(results(*PAIR, *more)), "geometric mean of 1")
    assert (mean[2], mean[5]) == ("**2.00x**", "**2.00x**")


def test_what_was_not_reported_is_in_no_table() -> None:
    wrong = row("opara", 1.0, samples=None, problem="wrong: error 1 against eager")
    found = results(PAIR[0], wrong)
    for table in (batches, gaps, memory, markdown):
        assert "tiny" not in table(found)


def test_host_time_is_what_the_wall_shows_beyond_the_gpu() -> None:
    """Walls take twice what the GPU takes here; Dynamo alone leaves the GPU idle."""
    alone = row("dynamo", 0.1)
    assert alone.samples is not None
    alone = replace(alone, samples=replace(alone.samples, gpu=None))
    assert cells(host(results(*PAIR, alone)), "tiny float16") == ["200", "2000", "1000"]
    assert "tiny" not in host(results(*PAIR)), "where nobody measured it"
    table = case_table(results(*PAIR, alone), PAIR[0].case)
    assert [*table.columns[1].cells] == ["1.00x", "2.00x", "-"], "no ratio of one clock to another"


def test_other_policies_and_one_stream() -> None:
    alone = {"sequential,copy_outputs=False": 1.6, "sequential,plain,copy_outputs=False": 1.6}
    others = {"paper": 1.5, "nimble": 1.25, "wavefront": 3.0, **alone}
    text = policies(results(*PAIR, *(row(f"opara:{name}", ms) for name, ms in others.items())))
    expected = ["1.50x", "1.25x", "3.00x", "1.60x", "1.25x"]
    assert cells(text, "tiny float16") == expected
    assert cells(text, "geometric mean") == [f"**{ratio}**" for ratio in expected]
    assert "tiny" not in policies(results(*PAIR))
    larger = [row("reduce-overhead", 4.0, 8), row("opara", 2.0, 8)]
    larger += [row(f"opara:{name}", 2 * ms, 8) for name, ms in others.items()]
    assert policies(results(*larger)).startswith("| model, batch 8 |")
    assert cells(policies(results(*larger)), "tiny float16") == expected
    both = policies(results(*larger, *PAIR, *(row(f"opara:{name}", 1.0) for name in others)))
    assert cells(both, "tiny float16")[:4] == ["1.00x"] * 4, "of the smallest batch alone"
    several = {name: ms for name, ms in others.items() if "plain" not in name}
    for rewrites, last in (((), ["1.25x"]), (("fuse_gemv",), [""])):
        rows = [row(f"opara:{name}", ms, rewrites=rewrites) for name, ms in several.items()]
        text = policies(results(*PAIR, *rows))
        assert cells(text, "tiny float16") == [*expected[:4], *last], "on one stream, and on stock's kernels"


def test_parts_of_the_gap_add_up_to_the_whole() -> None:
    mine = row("opara", 1.0, streams=3, path_seconds=0.6e-3, streams_seconds=0.1e-3, launch_seconds=0.05e-3)
    assert cells(gaps(results(mine)), "tiny float16") == ["1000", "60%", "10%", "5%", "25%", "3"]
    assert "tiny" not in gaps(results(PAIR[1]))  # measured before there were parts


@pytest.mark.parametrize("known", [True, False])
def test_memory_beyond_the_model_and_all_in_all(known: bool) -> None:
    def held(peak: int, kept: int, arena: int = 0) -> dict[str, int]:
        return {
            "peak_bytes": peak * MIB,
            "held_bytes": kept * MIB,
            "model_bytes": 100 * MIB,
            "arena_bytes": arena * MIB,
        }

    stock = row("reduce-overhead", 2.0, **(held(20, 10) if known else {}))
    text = memory(results(stock, row("opara", 1.0, **held(50, 30, 5))))
    if known:
        assert cells(text, "tiny float16") == ["1", "100", "20, 10", "50, 30", "5.0", "1.25x"]
    else:
        assert "tiny" not in text


def test_what_the_least_memory_takes_and_how_fast_it_is() -> None:
    def taking(backend: str, ms: float, peak: int, **more: Any) -> Row:
        nbytes = {"peak_bytes": peak * MIB, "held_bytes": MIB, "model_bytes": 100 * MIB, "arena_bytes": 0}
        return replace(row(backend, ms, **more), **nbytes)

    others = [taking(name, 1.0, 20, model="other") for name in ("reduce-overhead", "opara")]
    lean = taking("opara:extra_memory=0", 1.6, 32)
    text = memory(results(taking("reduce-overhead", 2.0, 20), taking("opara", 1.0, 80), lean, *others))
    assert cells(text, "tiny float16")[-3:] == ["1.50x", "1.10x", "1.25x"]
    assert cells(text, "other float16")[-3:] == ["1.00x", "", ""]


def test_an_option_is_compared_within_its_process() -> None:
    """Another process may have had another clock."""
    slow = [row("opara", 4.0, process=1), row("opara:combo_kernels=True", 6.0, process=1)]
    text = options(results(*PAIR, *slow, row("opara", 1.0, model="other")))
    assert cells(text, "tiny float16") == ["1.50x"]
    assert "other" not in text


def test_what_a_search_takes_is_the_median_and_the_most_of_all_processes() -> None:
    def searched(process: int, seconds: float | None, profile: float = 0.1, **more: Any) -> Row:
        made = row("opara", 1.0, kernels=7, **more)
        return replace(made, process=process, search_seconds=seconds, profile_seconds=profile)

    processes = (searched(0, 0.5), searched(1, 0.9), searched(2, 0.6))
    assert cells(searches(results(*processes)), "tiny float16") == ["7", "0.60", "0.90", "0.10"]
    larger = (searched(0, 2.0, 0.4, batch=8), searched(0, 3.0, 0.5, batch=8, model="large"))
    text = searches(results(*larger, *processes))
    assert "| model | kernels | batch 1, s | batch 8, s | at most, s | the profile, s |" in text
    assert cells(text, "tiny float16") == ["7", "0.60", "2.00", "2.00", "0.10"]
    assert cells(text, "large float16") == ["7", "", "3.00", "3.00", "0.50"]
    assert "1 to 3 processes" in text
    assert "tiny" not in searches(results(searched(0, None))), "nothing was searched for"


def test_rewrites_alone_and_together_over_none_within_a_process() -> None:
    def raced(ms: dict[str, float], **more: Any) -> Row:
        timed = tuple((tuple(names.split()), taken * 1e-3) for names, taken in ms.items())
        return row("opara:try_rewrites=True", 1.0, lowerings=timed, **more)

    text = lowerings(
        results(
            raced({"": 2.0, "fuse join": 0.5, "join": 3.0, "fuse": 1.0}),
            raced({"": 8.0, "fuse join": 6.0, "join": 4.0}, process=1),  # another clock, and one was left out
            raced({"": 1.0, "join": 0.9}, model="one"),
            raced({"": 1.0, "fuse": 0.8, "join": 0.9}, model="apart"),
            raced({"": 1.0, "unfold": 0.1}, model="large", batch=8),
            raced({"unfold": 1.0, "unfold fuse": 0.1}, model="asked"),
            raced({"": 1.0, "unfold": 0.1}, model="wrong", samples=None, problem="wrong: error 1 against eager"),
            row("opara", 1.0, model="plain"),
        )
    )
    head, _, *lines = text.split("\n\n")[0].splitlines()
    assert head == "| model, batch 1 | without, us a replay | `fuse` | `join` | all together |"
    assert len(lines) == 3
    assert cells(text, "tiny float16") == ["5000", "0.50x", "1.00x", "0.50x"]
    assert cells(text, "one float16") == ["1000", "", "0.90x", "0.90x"]
    assert cells(text, "apart float16") == ["1000", "0.80x", "0.90x", ""], "nobody timed both"
    assert "commit abc1234, 1 to 2 processes a case" in text
