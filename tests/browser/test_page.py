"""The HTML page in a real browser: it opens from a file, asks the network for nothing, and answers questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.recorded_replays import report_of

BLOCK = "features.5"  # GoogLeNet's first inception block


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Any:
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(page_file.as_uri())
    return browser


def select(browser: Any, block: str) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    Select(browser.find_element(By.ID, "block")).select_by_value(block)


def all_of(browser: Any, css: str) -> list[Any]:
    found: list[Any] = browser.find_elements("css selector", css)
    return found


def view(browser: Any) -> tuple[float, float]:
    (svg,) = all_of(browser, "#chart svg")
    return float(svg.get_attribute("data-from")), float(svg.get_attribute("data-to"))


def test_it_opens_without_errors_and_without_the_network(opened: Any) -> None:
    kernels = len(report_of("googlenet").shapes()[0].kernels)
    for kind in ("measured", "plan", "sequential"):
        assert len(all_of(opened, f"svg .kernel[data-timeline={kind}]")) == kernels
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


def test_hovering_a_kernel_shows_its_data(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    select(opened, BLOCK)
    (bar,) = all_of(opened, "svg .kernel[data-timeline=measured][aria-label^='features.5.three.1.conv: convolution']")
    ActionChains(opened).move_to_element(bar).perform()
    (tip,) = all_of(opened, "#tip")
    assert tip.is_displayed()
    row = report_of("googlenet").shapes()[0].kernels[int(bar.get_attribute("data-k"))]
    launch = row.launches[0]
    for shown in (row.label, row.call, row.source, "Inception", f"{launch.registers} registers", "critical path"):
        assert shown in tip.text
    ActionChains(opened).move_by_offset(0, -400).perform()
    assert not tip.is_displayed()


def test_zooming_moving_and_fitting(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

    whole = view(opened)
    opened.find_element("id", "in").click()
    closer = view(opened)
    assert whole[0] < closer[0] < closer[1] < whole[1]
    (svg,) = all_of(opened, "#chart svg")
    ActionChains(opened).scroll_from_origin(ScrollOrigin.from_element(svg), 0, -200).perform()
    closest = view(opened)
    assert closest[1] - closest[0] < closer[1] - closer[0]
    opened.find_element("id", "out").click()
    assert view(opened)[1] - view(opened)[0] > closest[1] - closest[0]
    opened.find_element("id", "all").click()
    assert view(opened) == pytest.approx(whole)


def test_a_stranger_finds_what_runs_side_by_side_and_the_critical_path(opened: Any) -> None:
    select(opened, BLOCK)
    pairs = [row.text for row in all_of(opened, "#pairs tr[data-k]")]
    assert any("features.5.one.conv: convolution" in text and "features.5.three.0.conv" in text for text in pairs)
    assert all(text.count("features.5.") >= 2 for text in pairs)
    path = [item.text for item in all_of(opened, "#path li")]
    assert len(path) == len(report_of("googlenet").shapes()[0].critical)
    assert any("features.5.three.1.conv: convolution" in text for text in path)
    red = {bar.get_attribute("data-k") for bar in all_of(opened, "svg .kernel.critical[data-timeline=plan]")}
    assert {text.split()[0] for text in path} >= red


def test_a_selected_kernel_stays_and_shows_its_waits(opened: Any) -> None:
    select(opened, BLOCK)
    (bar,) = all_of(opened, "svg .kernel[data-timeline=measured][aria-label^='features.5.three.0.conv: convolution']")
    bar.click()
    assert "waits for" in opened.find_element("id", "detail").text
    assert all_of(opened, "svg .wait")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_of_it(opened: Any, scheme: str, tmp_path: Path) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        assert opened.save_screenshot(str(tmp_path / f"{scheme}.png"))
        colour = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (brightness > 600) is (scheme == "light")
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_report_without_graphs_shows_no_empty_parts(browser: Any, tmp_path: Path) -> None:
    report = replace(report_of("googlenet"), graphs=(), notes=("no graph of this model was ours to schedule",))
    browser.get(report.save_html(tmp_path / "none.html").as_uri())
    assert [h.text for h in all_of(browser, "h2") if h.is_displayed()] == ["As text"]
    assert [p.text for p in all_of(browser, "#cards p")] == ["No graph was scheduled."]
    assert "ours to schedule" in all_of(browser, "#about")[0].text
    assert browser.get_log("browser") == []
