"""The report in a browser: it opens from disk, says nothing on the console, does what is clicked and typed.

Needs Debian's chromium (or any that is on the path) and playwright; skipped, with the reason, without them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import Ended
from made_runs import made_run
from PIL import Image

from diag.show.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for path in map(shutil.which, NAMES) if path), None)
pytestmark = pytest.mark.skipif(FOUND is None, reason=f"none of {', '.join(NAMES)} is on the path")
CURVES = ".plot[data-chart^=curves-]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with api.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=FOUND, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(finished: tuple[Path, Ended], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([finished[0]], tmp_path_factory.mktemp("page") / "report.html").path


class Watched:
    """An open page with everything that it said and asked for. unfold: whether all models' details are."""

    def __init__(
        self,
        browser: Browser,
        file: Path,
        *,
        hash: str = "",
        width: int = 1280,
        scheme: str = "light",
        unfold: bool = True,
    ):
        # without smooth scrolling, places are where they are at once
        self.context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
            reduced_motion="reduce",
        )
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri() + hash)
        if unfold:
            self.page.evaluate(
                "document.querySelectorAll('details.line').forEach((line) => { line.open = true; })"
            )

    def bring(self, found: Locator) -> Locator:
        """Scrolls to an element and lets the page hear of it: scrolling hides tooltips."""
        found.scroll_into_view_if_needed()
        self.settle()
        return found

    def settle(self) -> None:
        """Waits for two frames: events of scrolling come with the next one."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def column(self, place: int) -> list[float]:
        cells = self.page.locator(f"table.sortable >> nth=0 >> tbody tr > :nth-child({place})")
        return [float(cell.get_attribute("data-value") or "nan") for cell in cells.all()]

    def heading(self, place: int) -> Locator:
        return self.page.locator(f"table.sortable >> nth=0 >> thead th:nth-child({place})")


@pytest.fixture
def watched(browser: Browser, file: Path) -> Iterator[Watched]:
    opened = Watched(browser, file)
    yield opened
    opened.context.close()
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []


def test_it_opens_from_disk_and_asks_for_nothing(watched: Watched, file: Path) -> None:
    assert watched.page.title() == "Attention bias in demo:vit-p16"
    assert watched.asked == [file.as_uri()]
    assert watched.page.locator("h2").first.inner_text() == "Summary"


@pytest.mark.parametrize(("width", "most"), [(1400, 700), (390, 900)])
@pytest.mark.parametrize("runs", [1, 9])
def test_the_first_chart_is_on_the_first_screen(
    browser: Browser, tmp_path: Path, width: int, most: int, runs: int
) -> None:
    """Its frame begins there, below title and legend, also with nine lines of long names."""
    given = [
        made_run(tmp_path / f"run-{place}", model=f"timm:a_model_with_a_name.of_run_{place}")
        for place in range(runs)
    ]
    written = write_report(given, tmp_path / "report.html").path
    opened = Watched(browser, written, width=width, unfold=False)
    box = opened.page.locator(".plot").first.bounding_box()
    assert box is not None
    assert box["y"] < most
    opened.context.close()


def test_the_details_of_several_models_are_folded_until_linked_to(browser: Browser, file: Path) -> None:
    opened = Watched(browser, file, unfold=False)
    lines = opened.page.locator("details.line")
    assert [line.get_attribute("open") for line in lines.all()] == [None] * 2
    table = lines.nth(1).locator("section[id^=layers-]")
    expect(table).to_be_hidden()
    opened.page.evaluate(f"location.hash = '{table.get_attribute('id')}'")
    expect(table).to_be_in_viewport()
    expect(lines.nth(0).locator("section").first).to_be_hidden()
    opened.context.close()
    assert opened.said == []


def test_a_row_of_few_numbers_is_a_card_on_a_phone(browser: Browser, file: Path) -> None:
    opened = Watched(browser, file, width=390)
    row = opened.page.locator("#glance tbody tr").first
    boxes = [cell.bounding_box() for cell in row.locator("> *").all()]
    assert all(box and box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    assert len({box["y"] for box in boxes if box}) == len(boxes)
    named = opened.page.evaluate("getComputedStyle(document.querySelector('#glance td'), '::before').content")
    assert named.strip('"') == "alignment bias"
    opened.context.close()


def test_the_watch_would_hear_an_error(browser: Browser, tmp_path: Path) -> None:
    """A negative control of `said` and `asked`."""
    (tmp_path / "bad.html").write_text("<img src='http://127.0.0.1:9/x.png'><script>nothing()</script>")
    opened = Watched(browser, tmp_path / "bad.html")
    opened.context.close()
    assert any("nothing is not defined" in said for said in opened.said)
    assert "http://127.0.0.1:9/x.png" in opened.asked


def test_a_click_on_a_heading_sorts(watched: Watched) -> None:
    before = watched.column(2)
    assert watched.heading(1).get_attribute("aria-sort") == "ascending"
    watched.heading(2).locator("button").click()
    assert watched.column(2) == sorted(before, reverse=True)
    assert watched.heading(2).get_attribute("aria-sort") == "descending"
    assert watched.heading(1).get_attribute("aria-sort") == "none"
    watched.heading(2).locator("button").click()
    assert watched.column(2) == sorted(before)
    watched.heading(1).locator("button").click()
    assert watched.column(2) == before


def test_enter_on_a_heading_sorts_too(watched: Watched) -> None:
    before = watched.column(3)
    watched.heading(3).locator("button").focus()
    watched.page.keyboard.press("Enter")
    assert watched.column(3) == sorted(before, reverse=True) != before
    assert watched.heading(3).get_attribute("aria-sort") == "descending"


def test_headings_tell_their_definition(watched: Watched) -> None:
    watched.bring(watched.heading(2).locator("button")).hover()
    expect(watched.page.locator("#tip")).to_contain_text("cos(yᵢ, vᵢ)")


def test_a_definition_reached_by_key_stays_while_the_page_scrolls_to_it(watched: Watched) -> None:
    watched.heading(1).locator("button").focus()
    watched.page.evaluate("window.scrollTo({ top: 0, behavior: 'instant' })")
    watched.page.keyboard.press("Tab")
    tip = watched.page.locator("#tip")
    expect(tip).to_contain_text("cos(yᵢ, vᵢ)")
    watched.settle()
    assert watched.page.evaluate("window.scrollY") > 0
    expect(tip).to_be_visible()
    expect(tip).to_be_in_viewport()


def test_pointing_at_a_curve_reads_its_values(watched: Watched) -> None:
    plot = watched.page.locator(CURVES).first
    assert watched.page.locator("#tip").is_hidden()
    watched.bring(plot).hover()
    expect(watched.page.locator("#tip")).to_be_visible()
    tip = watched.page.locator("#tip").inner_text()
    assert tip.startswith("layer ")
    assert "partner null" in tip
    layer = tip.split()[1]
    shown = watched.page.locator(
        f"table.sortable >> nth=0 >> tbody tr:has(th[data-value='{layer}']) td >> nth=0"
    )
    assert shown.inner_text().split()[0] in tip


def test_arrow_keys_read_a_curve_aloud(watched: Watched) -> None:
    watched.page.locator(CURVES).first.focus()
    watched.page.keyboard.press("End")
    last = watched.page.locator("#live").inner_text()
    watched.page.keyboard.press("ArrowLeft")
    before = watched.page.locator("#live").inner_text()
    assert last.startswith("layer 5. own value 0.")
    assert before.startswith("layer 4. own value 0.")


def test_a_click_on_a_map_opens_that_head(watched: Watched) -> None:
    place = watched.page.locator(".map").first
    watched.bring(place)
    svg = place.locator("svg").bounding_box()
    assert svg is not None
    wide, high = map(float, str(place.get_attribute("data-cell")).split())
    unit = svg["width"] / 380
    watched.page.mouse.click(svg["x"] + (34 + 1.5 * wide) * unit, svg["y"] + (4 + 3.5 * high) * unit)
    expect(watched.page.locator("dialog h2")).to_have_text("Layer 3, head 1")
    expect(watched.page).to_have_url(re.compile("/3/1$"))
    expect(watched.page.locator("dialog .head-table tbody tr")).to_have_count(21)
    watched.page.get_by_role("button", name="next head").click()
    expect(watched.page.locator("dialog h2")).to_have_text("Layer 3, head 2")
    watched.page.keyboard.press("Escape")
    expect(watched.page.locator("dialog")).to_be_hidden()
    expect(watched.page).to_have_url(re.compile("^[^#]+$"))


def test_a_map_works_with_keys_alone(watched: Watched) -> None:
    watched.page.locator(".map").first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        watched.page.keyboard.press(key)
    assert watched.page.locator("#live").inner_text().startswith("layer 2, head 1: 0.")
    watched.page.keyboard.press("Enter")
    expect(watched.page.locator("dialog h2")).to_have_text("Layer 2, head 1")
    watched.page.locator("dialog [data-close]").click()
    expect(watched.page.locator(".map").first).to_be_focused()


def test_the_form_and_a_link_open_a_head_too(watched: Watched, browser: Browser, file: Path) -> None:
    form = watched.page.locator("form.choose").first
    form.locator("select[name=layer]").select_option("4")
    form.locator("button").click()
    expect(watched.page.locator("dialog h2")).to_have_text("Layer 4, head 0")
    linked = Watched(browser, file, hash=f"#head={form.get_attribute('data-line')}/1/2")
    expect(linked.page.locator("dialog h2")).to_have_text("Layer 1, head 2")
    linked.context.close()
    astray = Watched(browser, file, hash="#head=nobody/1/2")
    assert astray.page.locator("dialog").is_hidden()
    astray.context.close()
    assert linked.said == astray.said == []


def test_a_map_has_its_numbers_as_a_table(watched: Watched) -> None:
    details = watched.page.locator("details.long").first
    details.locator("summary").click()
    expect(details.locator("tbody tr")).to_have_count(6)
    expect(details.locator("tbody tr").first.locator("td")).to_have_count(3)


@pytest.mark.parametrize(
    ("width", "scheme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")]
)
def test_it_fits_and_shows(browser: Browser, file: Path, tmp_path: Path, width: int, scheme: str) -> None:
    opened = Watched(browser, file, width=width, scheme=scheme)
    opened.page.evaluate(
        "document.querySelectorAll('details').forEach((details) => { details.open = true; })"
    )
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    shot = tmp_path / "shot.png"
    opened.page.screenshot(path=shot)
    opened.context.close()
    with Image.open(shot) as image:
        assert image.width == width
        corner = image.convert("L").getpixel((1, 400))
        assert isinstance(corner, int)
        assert (corner > 128) == (scheme == "light")
        assert len(set(image.convert("L").get_flattened_data())) > 20  # something is drawn


def test_it_prints_with_everything_unfolded(watched: Watched, tmp_path: Path) -> None:
    watched.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    watched.page.emulate_media(media="print")
    folded = watched.page.locator("main details:not(.alternative):not([open])").count()
    assert folded == 0
    assert watched.page.locator("nav").is_hidden()
    assert watched.page.locator("table.sortable").nth(1).is_visible()
    watched.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert watched.page.locator("main details:not(.alternative):not([open])").count() > 0
    assert len(watched.page.pdf(path=tmp_path / "page.pdf")) > 10_000
