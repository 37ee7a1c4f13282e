"""The report: what is in the page, and what a person sees and does in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from opd_lightning.callbacks import AgreementMonitor, Alarms, CompletionEval, EntropyCollapse, PositionMap, RolloutRefresh
from opd_lightning.callbacks.series import read
from opd_lightning.cli import main
from opd_lightning.inspect import page, runs
from opd_lightning.inspect.runs import Run, grouped, named
from opd_lightning.samplers import NativeSampler
from tests.helpers import tiny_data, tiny_module, tiny_trainer

BROWSER = [shutil.which(name) for name in ("chromium", "chromedriver")]
needs_browser = pytest.mark.skipif(None in BROWSER, reason="no chromium with chromedriver on this machine")


@pytest.fixture(scope="module")
def folders(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of one recipe and a run of another, five steps each, one with an alarm."""
    root = tmp_path_factory.mktemp("page")
    out = []
    for name, rate, seed in (("plain/seed-0", 1e-2, 0), ("plain/seed-1", 1e-2, 1), ("fast <b>", 3e-2, 0)):
        run = root / name
        sampler = NativeSampler(max_new_tokens=12)
        callbacks: list[Any] = [AgreementMonitor(k=4), PositionMap(bins=4), RolloutRefresh(sampler=sampler, seed=seed)]
        callbacks += [CompletionEval(every_n_steps=2, sampler=sampler)]
        if "fast" in name:
            callbacks.append(Alarms([EntropyCollapse(floor=99.0, patience=2)], {"EntropyCollapse": "log"}))
        trainer = tiny_trainer(run, callbacks, max_steps=5, logger=CSVLogger(run, name="logs"))
        trainer.fit(tiny_module(pair, lr=rate), tiny_data())
        (run / "config.yaml").write_text(
            f"seed_everything: {seed}\nmodel: {{lr: {rate}}}\ntrainer: {{default_root_dir: {run}}}\n"
        )
        out.append(run)
    return out


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


# ---- the file ---------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_share_a_curve(folders: list[Path]) -> None:
    assert grouped(named(folders)) == [("plain", [0, 1]), ("fast <b>", [2])]
    alone = [Run("a", folders[0]), Run("b", folders[0].parent)]  # the second one has no configuration
    assert grouped(alone) == [("a", [0]), ("b", [1])]


def test_everything_that_was_logged_is_in_the_page_and_nothing_is_fetched(folders: list[Path]) -> None:
    text = page.render("all", named(folders))
    data = data_of(text)
    logged = runs.curves(folders[0])
    assert data["runs"][0]["curves"].keys() == logged.keys()
    kl = data["runs"][0]["curves"]["train/reverse_kl"]
    assert list(zip(kl["steps"], kl["values"], strict=True)) == [
        (s + 1, pytest.approx(v, rel=1e-4)) for s, v in logged["train/reverse_kl"]
    ]
    assert {key for panel in data["panels"] + data["others"] for key, _ in panel["keys"]} >= {
        k for k in logged if k[:5] != "alarm"
    }
    assert all(data["define"][key] for key in logged if not key.startswith("eval/pass"))
    assert [a["alarm"] for a in data["runs"][2]["alarms"]] == ["entropy_collapse"]
    assert "21. data" in text and "lower the learning rate" in text and "fast &lt;b&gt;" in text and "<b>:" not in text
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)""", text)


def test_long_runs_stay_small(tmp_path: Path, folders: list[Path]) -> None:
    """A hundred thousand steps, and as many tokens as twenty looks at rollouts of 256 tokens leave."""
    run = tmp_path / "long"
    shutil.copytree(folders[0], run)
    lines = ["step,train/loss", *(f"{step},{1 / (step + 1)}" for step in range(100_000))]
    (run / "logs/version_0/metrics.csv").write_text("\n".join(lines))
    first = read(folders[0] / "tokens.jsonl")[0]
    many = {k: (v * 300)[:256] if isinstance(v, list) else v for k, v in first.items()}
    with (run / "tokens.jsonl").open("w") as file:
        for step in range(120):
            file.write(json.dumps({**many, "step": step}) + "\n")
    text = page.render("long", [Run("long", run)])
    data = data_of(text)
    assert len(text) < 5e6
    assert len(data["runs"][0]["curves"]["train/loss"]["steps"]) <= runs.POINTS
    steps = [line["step"] for line in data["runs"][0]["tokens"]]
    assert steps[0] == 0 and steps[-1] == 119 and 20 < len(steps) < 100


def test_several_runs_from_the_command_line(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, folders)]) == 0
    shown = capsys.readouterr().out
    above = folders[2].parent
    assert str(above / "comparison.html") in shown
    assert re.search(r"^plain .*±.* 2$", shown, re.MULTILINE) and re.search(r"^fast <b> .* 1$", shown, re.MULTILINE)
    assert main(["report", *map(str, folders[:2]), "--out", str(above / "other/mine.html")]) == 0
    assert "2 runs side by side" in (above / "other/mine.html").read_text()
    assert main(["report", str(folders[0]), str(above / "absent")]) == 2


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER[0])
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1280,1400"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(BROWSER[1])))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, folders: list[Path], tmp_path: Path) -> Any:
    file = tmp_path / "report.html"
    file.write_text(page.render("three runs", named(folders)), encoding="utf-8")
    browser.get(file.as_uri())
    browser.execute_script("localStorage.clear()")
    browser.get(file.as_uri())
    return browser


def one(driver: Any, selector: str) -> Any:
    return driver.find_element("css selector", selector)


def settle(driver: Any) -> None:
    """Two frames later: the browser tells of a scroll, which hides the tip, in the frame after it, however busy it is."""
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))")


def until(driver: Any, holds: Callable[[Any], object]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 30).until(holds)


def hover(driver: Any, element: Any, x: int = 0, y: int = 0) -> None:
    from selenium.webdriver import ActionChains

    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    settle(driver)
    ActionChains(driver).move_to_element_with_offset(element, x, y).perform()
    settle(driver)


def click(driver: Any, element: Any) -> None:
    hover(driver, element)
    element.click()
    settle(driver)


@needs_browser
@pytest.mark.browser
def test_it_opens_offline_and_without_an_error(opened: Any, tmp_path: Path) -> None:
    assert opened.execute_script("return document.documentElement.dataset.ready") == "yes"
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not opened.get_log("browser")
    picture = tmp_path / "page.png"
    assert opened.save_screenshot(str(picture)) and picture.stat().st_size > 20_000
    names = [e.text for e in opened.find_elements("css selector", "main h2")]
    assert names[:5] == ["Results", "Alarms", "Curves", "Where in the completion", "Tokens"]


@needs_browser
@pytest.mark.browser
def test_curves_show_their_values_and_groups_can_be_switched_off(opened: Any, folders: list[Path]) -> None:
    figure = next(f for f in opened.find_elements("css selector", "#panels figure") if f.text.startswith("Reverse KL on roll"))
    count = lambda what: len(figure.find_elements("css selector", f"path.{what}"))  # noqa: E731
    assert (count("line"), count("band")) == (2, 1)  # two groups, one of two seeds
    assert len(figure.find_elements("css selector", "line.alarm")) == 1
    svg = figure.find_element("css selector", "svg")
    hover(opened, svg, x=svg.size["width"] // 2 - 4)
    values = [runs.curves(folder)["train/reverse_kl"][-1][1] for folder in folders]
    shown = one(opened, "#tip").text
    assert "step 5" in shown
    plain, fast = (float(re.search(rf"{name}: ([\d.]+)", shown)[1]) for name in ("plain", "fast <b>"))
    assert plain == pytest.approx((values[0] + values[1]) / 2, rel=5e-3) and fast == pytest.approx(values[2], rel=5e-3)
    assert "±" in shown
    svg.send_keys("\ue012\ue012")  # left, left
    assert "step 3" in one(opened, "#tip").text
    click(opened, one(opened, "#legend button"))
    assert (count("line"), count("band")) == (1, 0)
    assert one(opened, "#legend button").get_attribute("aria-pressed") == "false"
    click(opened, one(opened, "#log"))
    click(opened, one(opened, "#more summary"))
    until(opened, lambda page: len(page.find_elements("css selector", "#others figure")) > 5)
    assert not opened.get_log("browser")


@needs_browser
@pytest.mark.browser
def test_heat_maps_show_the_cell_under_the_pointer(opened: Any, folders: list[Path]) -> None:
    figures = opened.find_elements("css selector", "#maps-panels figure")
    assert len(figures) == 8  # four quantities, two groups
    svg = next(f for f in figures if f.text.startswith("Reverse KL: fast")).find_element("css selector", "svg")
    hover(opened, svg, x=svg.size["width"] // 2 - 9, y=-svg.size["height"] // 2 + 12)
    line = read(folders[2] / "positions.jsonl")[-1]
    shown = one(opened, "#tip").text
    assert "step 5, tokens 0 to 2" in shown
    assert float(re.search(r": ([\d.]+) nats", shown)[1]) == pytest.approx(line["reverse_kl"][0], rel=5e-3)
    svg.send_keys("\ue012\ue015")  # left, down
    assert "step 4, tokens 3 to 5" in one(opened, "#tip").text


@needs_browser
@pytest.mark.browser
def test_tokens_are_coloured_and_tell_what_both_models_prefer(opened: Any, folders: list[Path]) -> None:
    from selenium.webdriver.support.ui import Select

    lines = read(folders[0] / "tokens.jsonl")
    steps = sorted({line["step"] for line in lines})
    tokens = lambda: opened.find_elements("css selector", ".tok")  # noqa: E731
    assert len(tokens()) == len(lines[0]["ids"]) and one(opened, "#step-value").text == f"step {steps[0]}"
    click(opened, opened.find_elements("css selector", "#rows button")[-1])
    line = [line for line in lines if line["step"] == steps[0]][-1]  # the longest
    assert len(tokens()) == len(line["ids"]) > 3
    hover(opened, tokens()[2])
    detail = one(opened, "#detail").text
    for who in ("student", "teacher"):
        best, share = line[f"{who}_top"][2][0], line[f"{who}_top_probs"][2][0]
        assert line["pieces"][str(best)].strip() in detail
        assert f"{float(f'{100 * share:.3g}'):g} %" in detail
    assert f"token 2, id {line['ids'][2]}" in detail
    click(opened, tokens()[2])
    tokens()[2].send_keys("\ue014")  # right
    assert f"token 3, id {line['ids'][3]}" in one(opened, "#detail").text
    assert opened.switch_to.active_element == tokens()[3]
    one(opened, "#step").send_keys("\ue010")  # end
    assert one(opened, "#step-value").text == f"step {steps[-1]}"
    last = [line for line in lines if line["step"] == steps[-1]]
    assert len(tokens()) == len(last[-1]["ids"])
    click(opened, opened.find_elements("css selector", "#rows button")[1])
    assert len(tokens()) == len(last[1]["ids"])
    colors = lambda: [t.value_of_css_property("background-color") for t in tokens()]  # noqa: E731
    before = colors()
    Select(one(opened, "#kind")).select_by_visible_text("reverse KL")
    strongest = max(range(len(before)), key=lambda i: last[1]["reverse_kl"][i])
    strength = [float(c.rpartition(",")[2].strip(" )")) if "rgba" in c else 1.0 for c in colors()]
    assert colors() != before and strength[strongest] == max(strength)
    Select(one(opened, "#run")).select_by_index(2)
    assert len(tokens()) == len(read(folders[2] / "tokens.jsonl")[0]["ids"])
    assert not opened.get_log("browser")


@needs_browser
@pytest.mark.browser
def test_light_and_dark_and_print(opened: Any) -> None:
    ground = lambda: opened.execute_script("return getComputedStyle(document.body).backgroundColor")  # noqa: E731
    found = []
    for _ in range(2):
        one(opened, "#theme").click()
        found.append((one(opened, "#theme").text, ground()))
    assert found == [("theme: light", "rgb(255, 255, 255)"), ("theme: dark", "rgb(21, 24, 29)")]
    opened.refresh()
    assert ground() == "rgb(21, 24, 29)"  # remembered
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert ground() == "rgb(255, 255, 255)" and not one(opened, "nav").is_displayed()
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@needs_browser
@pytest.mark.browser
def test_everything_has_a_name_for_those_who_do_not_see_it(opened: Any) -> None:
    nameless = opened.execute_script("""
        const what = "button, select, input, svg[role=img], [role=button], [role=group], aside";
        const named = (e) => e.getAttribute("aria-label") || e.textContent.trim() || e.closest("label")?.textContent.trim();
        return [...document.querySelectorAll(what)].filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 80));
    """)
    assert not nameless
    labels = [svg.get_attribute("aria-label") for svg in opened.find_elements("css selector", "#panels svg[role=img]")]
    assert all(re.search(r"at step \d", label) for label in labels)
