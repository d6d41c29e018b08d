"""The report in a headless Chromium: what a reader does with it, how fast it answers, and that nothing leaves it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from fast_ft.data.dataset import load_pool
from fast_ft.data.prepare import prepare
from fast_ft.data.selection import rejected, select
from fast_ft.recipe import loader
from fast_ft.recipe.schema import Data, Select
from fast_ft.report.data_map import Group, points
from fast_ft.report.explorer import answer, explore_page
from fast_ft.report.html import page
from fast_ft.report.server import PageServer
from fast_ft.report.watch import watch_page, watcher
from fast_ft.report.write import write_comparison, write_report
from tests.helpers.parts import REAL, needs_real_data
from tests.helpers.report_pages import EVIL, Browser, big_pool, chromium, made_run, recipe_file, training_rows

pytestmark = pytest.mark.skipif(
    chromium() is None, reason="no Chromium with chromedriver here (apt-get install chromium chromium-driver)"
)

SERVED: list[str] = []  # addresses of pages that a test serves itself
TEXTS = [f"{word} number {i}" for i, word in enumerate(["apple", "pear", "plum", "fig", "quince", "cherry"] * 4)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = Browser()
    yield found
    found.driver.quit()


@pytest.fixture(autouse=True)
def nothing_leaves_and_nothing_complains(browser: Browser) -> Iterator[None]:
    browser.logs()
    yield
    console, asked = browser.logs()
    assert console == []
    own = ("file:", "data:", "blob:", "about:", *SERVED)  # a page from this machine's server asks that server
    assert [url for url in asked if not url.startswith(own)] == []


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, prepared = made_run(recipe_file(tmp_path_factory.mktemp("report"), training_rows(400)), TEXTS)
    return write_report(folder, prepared).as_uri()


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with 52,002 rows."""
    taken = range(0, 5000, 50)
    found = points(big_pool(52_002), [Group("taken", taken)])
    path = tmp_path_factory.mktemp("big") / "big.html"
    select = Select(take=100, deduplicate="none").model_dump(mode="json")
    content = {"map": found.facts, "explore": {"select": select, "taken": [*taken], "limit": None}}
    names = {"map": "data-map", "take": "take-view", "choose": "explorer", "chosen": "chosen-view"}
    sections = [(name, name.title(), f'<div id="{id_}"></div>') for name, id_ in names.items()]
    path.write_text(page("big", "rows", sections, content, found.blocks), encoding="utf-8")
    return path


def place(browser: Browser, row: int | str) -> tuple[float, float]:
    """Where a row's point is in the window, after scrolling the map into sight."""
    browser.js("document.querySelector('#data-map').scrollIntoView({behavior: 'instant', block: 'center'})")
    script = """const m = fastFt.map, i = arguments[0], box = m.plot.over.getBoundingClientRect();
        const own = typeof i === "number" ? i : m.members[0];
        const { left, top } = m.plot.bbox, ratio = devicePixelRatio;
        return [box.left + (m.px[own] - left) / ratio, box.top + (m.py[own] - top) / ratio]"""
    x, y = browser.js(script, row)
    return x, y


def click(browser: Browser, x: float, y: float) -> None:
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y)


def test_a_point_shows_its_row_and_opens_it_with_tokens_apart(browser: Browser, report: str) -> None:
    browser.open(report)
    x, y = place(browser, "first")
    browser.mouse("mouseMoved", x, y)
    browser.wait("!document.querySelector('.tip').hidden && document.querySelector('.tip b').textContent !== '…'")
    row, tip = browser.js("return [fastFt.map.shown, document.querySelector('.tip').textContent]")
    text = browser.driver.execute_async_script("fastFt.rows.text(arguments[0]).then(arguments[1])", row)
    assert text["id"] in tip and text["prompt"] in tip and "score" in tip
    click(browser, x, y)
    browser.wait("document.querySelector('dialog').open")
    shown = browser.js("""const all = (kind) => document.querySelectorAll(".dialog-body > .tokens " + kind);
        return [".masked", ".trained"].map((kind) => [...all(kind)].map((n) => n.textContent).join(""))""")
    assert shown[0].startswith("<BOS>[INST]")
    assert text["prompt"] in shown[0] and text["response"] in shown[1] and shown[1].endswith("<EOS>")
    browser.keys("ESCAPE")
    browser.wait("!document.querySelector('dialog').open")


def test_the_map_by_keyboard_and_as_a_table(browser: Browser, report: str) -> None:
    browser.open(report)
    browser.js("fastFt.map.plot.over.focus()")
    browser.keys("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "ARROW_UP")
    browser.wait("document.querySelector('#live').textContent.length > 5")
    assert browser.js("return fastFt.map.groupOf[fastFt.map.shown] !== 255")
    browser.keys("ENTER")
    browser.wait("document.querySelector('dialog').open")
    first = browser.js("return document.querySelector('#row-title').textContent")
    browser.keys("ARROW_RIGHT")
    browser.wait(f"document.querySelector('#row-title').textContent !== {json.dumps(first)}")
    browser.keys("ESCAPE")
    browser.js("document.querySelector('#row-table').open = true")
    browser.wait("document.querySelectorAll('#row-table tbody tr').length === 20")


def test_other_metrics_and_zoom(browser: Browser, report: str) -> None:
    browser.open(report)
    pick(browser, "#map-y", "response_words")
    assert "response words up" in browser.js("return fastFt.map.plot.over.getAttribute('aria-label')")
    place(browser, "first")
    box = browser.js(
        "const b = fastFt.map.plot.over.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
    )
    before = browser.js("const s = fastFt.map.plot.scales; return s.x.max - s.x.min")
    x, y = box[0] + box[2] * 0.3, box[1] + box[3] * 0.3
    browser.mouse("mouseMoved", x, y)
    browser.mouse("mousePressed", x, y)
    for part in (0.1, 0.2, 0.3):
        browser.command(
            "Input.dispatchMouseEvent",
            type="mouseMoved",
            x=x + box[2] * part,
            y=y + box[3] * part,
            button="left",
            buttons=1,
        )
    browser.mouse("mouseReleased", x + box[2] * 0.3, y + box[3] * 0.3)
    browser.wait(f"fastFt.map.plot.scales.x.max - fastFt.map.plot.scales.x.min < {before / 2}")
    assert not browser.js("return document.querySelector('dialog').open")  # a drag is no click
    browser.js("document.querySelector('#map-reset').click()")
    browser.wait(f"Math.abs(fastFt.map.plot.scales.x.max - fastFt.map.plot.scales.x.min - {before}) < 1e-9")


def test_curves_show_stages_cap_and_gaps(browser: Browser, report: str) -> None:
    browser.open(report)
    titles = browser.js(
        "return [...document.querySelectorAll('#curves figcaption')].map(n => n.firstChild.textContent)"
    )
    assert titles == ["Loss", "Gradient norm", "Learning rate", "Speed", "GPU memory"]
    top = browser.js(
        "return fastFt.curves.charts.map(c => [c.plot.scales.y.max, Math.max(...c.plot.data.slice(1).flat())])"
    )
    assert all(high > most for high, most in top)  # no curve on the frame
    assert top[4][0] > 14.0  # the cap is in sight
    assert browser.js("return fastFt.curves.charts[0].plot.data[1][2]") is None  # step 3 had no loss
    assert "1 step skipped" in browser.js("return document.querySelector('#curves').textContent")


def pick(browser: Browser, menu: str, value: str) -> None:
    """Choose from a menu."""
    browser.js("const [menu, value] = arguments; const select = document.querySelector(menu); select.value = value;"
               "select.dispatchEvent(new Event('change'))", menu, value)  # fmt: skip


def listed(browser: Browser) -> list[str]:
    return browser.js("return [...document.querySelectorAll('.prompt-list .line')].map(n => n.textContent)")


def test_answers_sort_filter_and_keyboard(browser: Browser, report: str) -> None:
    browser.open(report)
    assert len(listed(browser)) == len(TEXTS)
    scores = {f"Prompt {i}: {text}": round(1 + 0.5 * (i * 7 % 18), 1) for i, text in enumerate(TEXTS)}
    for order, down in (("low", False), ("high", True), ("gain", True), ("loss", False)):
        pick(browser, "#answer-sort", order)
        values = [scores[text] for text in listed(browser)]
        assert values == sorted(values, reverse=down) and len(values) == len(TEXTS)
    browser.js("document.querySelector('#answer-filter').focus()")
    browser.keys(*"quin")
    assert len(listed(browser)) == 4 and all("quince" in text for text in listed(browser))
    assert browser.js("return document.querySelector('.controls [role=status]').textContent") == "4 of 24 prompts"
    browser.keys("ESCAPE")
    assert len(listed(browser)) == len(TEXTS)
    browser.js("document.activeElement.blur()")
    head = "return document.querySelector('.answer-head h3').textContent"
    seen = [browser.js(head)]
    for key in ("j", "j", "k", "ARROW_DOWN", "END"):
        browser.keys(key)
        seen.append(browser.js(head))
    assert seen[1] == seen[3] != seen[2] == seen[4] and len(set(seen)) == 4
    browser.keys("/")
    assert browser.js("return document.activeElement.id") == "answer-filter"


def test_an_answer_with_its_scores_words_and_end(browser: Browser, report: str) -> None:
    browser.open(report)
    text = browser.js("return document.querySelector('.answer-view').innerText")
    for part in (
        "Base model",
        "Tuned",
        "Prompt 0: apple",
        "Tuned 0: apple",
        "Words: apple",
        "Cut off at the token limit",
    ):
        assert part in text
    browser.keys("j")
    assert "Ended by itself (EOS), 11 tokens" in browser.js("return document.querySelector('.answer-view').innerText")


def test_paper_holds_every_answer_in_light_colours(browser: Browser, report: str) -> None:
    browser.open(report, dark=True)
    browser.js("window.onafterprint = null; dispatchEvent(new Event('beforeprint'))")
    assert browser.js("return document.querySelectorAll('.paper article > h3').length") == len(TEXTS)
    assert browser.js("return css('--card')") == "#ffffff"
    browser.js("dispatchEvent(new Event('afterprint'))")
    assert browser.js("return [css('--card'), document.querySelectorAll('.paper article').length]") == ["#1b2027", 0]


def test_text_of_rows_and_answers_never_becomes_markup(browser: Browser, tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path / "<b>evil<img src=x onerror=window.xss=9>", training_rows(300, evil=True))
    folder, prepared = made_run(recipe, EVIL)
    kinds = "img, svg, math, iframe, object, embed, video, form, base, main style, link[rel=stylesheet], main script"
    nodes = f"return document.querySelectorAll('{kinds}, [http-equiv=refresh], [onload], [onfocus], [ontoggle]').length"
    for path in (write_report(folder, prepared), write_comparison([folder, folder], tmp_path / "both.html")):
        browser.open(path.as_uri())
        for i in range(len(EVIL)):
            member = f"fastFt.map.members[{i} % fastFt.map.members.length]"
            browser.js(f"fastFt.answers.go({i}, true); fastFt.map.point({member})")
            browser.js(f"fastFt.view.open({member})")
            browser.wait("document.querySelector('dialog').open")
            browser.js("document.querySelector('dialog').close()")
        browser.js("document.querySelector('#row-table').open = true; dispatchEvent(new Event('beforeprint'))")
        time.sleep(0.2)
        assert browser.js("return window.xss ?? null") is None and browser.js(nodes) == 0
        assert (
            browser.js("return document.querySelector('.paper').textContent").count("<script>window.xss=1</script>")
            >= 2
        )


def test_the_outline_and_names_that_a_screen_reader_needs(browser: Browser, report: str) -> None:
    browser.open(report)
    levels = browser.js("""const heads = [...document.querySelectorAll("h1, h2, h3, h4")];
        return heads.filter((n) => n.checkVisibility()).map((n) => Number(n.tagName[1]))""")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    for tag in ("header", "nav", "main"):
        assert browser.js(f"return document.querySelectorAll('body {tag}').length") == 1
    browser.command("Accessibility.enable")
    tree = browser.command("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "combobox", "searchbox", "checkbox", "slider", "link", "region", "navigation", "application"}
    assert {node.get("role", {}).get("value") for node in tree} >= roles - {"slider"}
    for node in tree:
        if node.get("role", {}).get("value") in roles and not node.get("ignored"):
            assert node.get("name", {}).get("value"), node
    browser.command("Accessibility.disable")
    assert browser.js("return document.documentElement.lang") == "en"
    assert browser.js("const ids = [...document.querySelectorAll('[id]')].map((n) => n.id);"
                      "return ids.length - new Set(ids).size") == 0  # fmt: skip


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(browser: Browser, report: str, width: int, dark: bool) -> None:
    browser.open(report, width, 844, dark)
    assert browser.js("return document.documentElement.scrollWidth") <= width
    browser.js("fastFt.view.open(fastFt.map.members[0])")
    browser.wait("document.querySelector('dialog').open")
    assert browser.js("return document.documentElement.scrollWidth") <= width


def test_52_002_rows_load_in_3_s_and_answer_a_hover_in_100_ms(browser: Browser, big: Path) -> None:
    assert big.stat().st_size < 6e6  # a phone loads it
    seconds = min(browser.open(big.as_uri()) / browser.slowness() for _ in range(2))  # of two: this machine is shared
    x, y = place(browser, 2500)
    browser.js("""window.waits = []; const m = fastFt.map, point = m.point.bind(m);
        m.plot.over.addEventListener("pointermove", () => { window.moved = performance.now(); }, true);
        new MutationObserver(() => {
            if (m.tip.querySelector("b")?.textContent !== "…") window.waits.push(performance.now() - window.moved);
        }).observe(m.tip, { subtree: true, childList: true, characterData: true });""")
    slow = browser.slowness(0.9)
    for _ in range(3):  # until there are enough: a browser that is busy hears of some moves together
        for step in range(15):
            browser.mouse("mouseMoved", x - 150 + 20 * step, y + (step % 3) * 15)
            time.sleep(0.06)
        waits = sorted(each / max(slow, browser.slowness(0.9)) for each in browser.js("return window.waits"))
        if len(waits) >= 5:
            break
    assert len(waits) >= 5
    print(f"load {seconds:.2f} s, hover {waits[len(waits) // 2]:.0f} ms, at most {waits[-1]:.0f} ms")
    assert seconds < 3
    assert waits[int(0.9 * len(waits))] < 100


def test_a_slider_moves_52_002_rows_at_once(browser: Browser, big: Path) -> None:
    browser.open(big.as_uri())
    slow = browser.slowness()
    took = browser.js("""const e = fastFt.explorer, times = [];
        for (let k = 0; k < 5; k++) {
            e.where.response_words.low = 20 + 10 * k; e.rank_by.score = k; e.rank_by.response_words = 1;
            const began = performance.now(); e.update(); times.push(performance.now() - began);
        }
        return times""")
    print("sliders", [round(t) for t in took])
    assert sorted(took)[2] / max(slow, browser.slowness()) < 400


SETTINGS: list[dict[str, Any]] = [
    {},
    {"where": {"score": ">= 3.5"}, "rank_by": {"response_words": 1.0}, "take": 30},
    {"where": {"score": "> 3.5", "response_words": "5..20"}, "rank_by": {"score": -1.0}, "take": 40},
    {"where": {"ends_cleanly": True}, "rank_by": {"score": 1.0, "response_words": -0.5, "prompt_words": 1}, "take": 9},
    {"rank_by": {"type_token_ratio": 1.0, "prompt_words": 0.3}, "take": 25},
    {"where": {"ends_cleanly": "true", "score": "4"}, "rank_by": {"prompt_words": -2.0}, "take": 7},
    {"rank_by": {"score": 1.0, "prompt_words": 0.1}, "take": 350},
    {"where": {"conversation_words": "< 20"}, "rank_by": {"response_words": 1.0}, "method": "middle", "take": 21},
    {"where": {"conversation_words": "<= 30"}, "rank_by": {"response_words": 1.0}, "method": "stratified", "take": 12},
    {"method": "stratified", "take": 10_000},
]  # fmt: skip


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("explore")
    rows = folder / "rows"
    recipe = recipe_file(rows, training_rows(500))
    loaded = loader.load_recipe(recipe, [])
    (folder / "map.html").write_text(explore_page(loaded, prepare(loaded)), encoding="utf-8")
    return (folder / "map.html").as_uri(), rows / "train.json"


@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_the_page_takes_the_rows_that_a_run_takes(
    browser: Browser, explorer: tuple[str, Path], setting: dict[str, Any]
) -> None:
    address, train = explorer
    section = Select(**{"deduplicate": "none", **setting})
    expected = select(load_pool(Data(train=str(train))), section, seed=1, limit=None).indices
    if browser.driver.current_url != address:
        browser.open(address)
    taken = browser.js(
        """const e = fastFt.explorer; e.select = arguments[0]; e.own = []; e.reset();
        e.start = null; e.update(); return e.taken""",
        section.model_dump(mode="json"),
    )
    assert taken == expected


def test_the_yaml_can_be_pasted(browser: Browser, explorer: tuple[str, Path]) -> None:
    browser.open(explorer[0])
    before = yaml.safe_load(browser.js("return document.querySelector('#yaml').textContent"))["select"]
    assert Select(**before) == Select(where={"score": ">= 2"}, rank_by={"score": 1.0, "response_words": 0.5}, take=20)
    for name, value in (("at least response words", "7"), ("weight of score", "-1.5")):
        browser.js("""const field = document.querySelector(`[aria-label="${arguments[0]}, as a number"]`);
            field.value = arguments[1]; field.dispatchEvent(new Event("input"))""", name, value)  # fmt: skip
    # both changes: each is drawn in a frame of its own
    shown = "document.querySelector('#yaml').textContent"
    browser.wait(f"{shown}.includes('>= 7') && {shown}.includes('-1.5')")
    after = Select(**yaml.safe_load(browser.js("return document.querySelector('#yaml').textContent"))["select"])
    assert after.where["response_words"] == ">= 7" and after.rank_by["score"] == -1.5
    pool = load_pool(Data(train=str(explorer[1])))
    expected = select(pool, after.model_copy(update={"deduplicate": "none"}), seed=1, limit=None).indices
    assert browser.js("return fastFt.explorer.taken") == expected


def served(content: str, answered: Any) -> Iterator[str]:
    """Serve a page on this machine's loopback, and yield its address."""
    server = PageServer(content, answered)
    address = server.address
    Thread(target=server.serve_forever, daemon=True).start()
    SERVED.append(address)
    yield address
    server.shutdown()
    server.server_close()


def repeating(count: int) -> list[dict[str, Any]]:
    """Rows of which every third is nearly the row before it."""
    rows = training_rows(count)
    for before, row in zip(rows[1::3], rows[2::3], strict=False):
        row["conversations"] = [dict(turn) for turn in before["conversations"]]
        row["conversations"][0]["value"] += "!"
        row["score"] = 5.0
    return rows


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A recipe that leaves out near-duplicates of which there are many, and its rows."""
    where = {"score": ">= 2", "response_words": ">= 4"}
    section = {"where": where, "rank_by": {"score": 1.0}, "take": 40, "deduplicate": "near"}
    loaded = loader.load_recipe(recipe_file(tmp_path_factory.mktemp("near"), repeating(300), select=section), [])
    return loaded, prepare(loaded)


def change(browser: Browser, name: str, value: str) -> None:
    """Type into a metric's field."""
    browser.js("""const field = document.querySelector(`[aria-label="${arguments[0]}, as a number"]`);
        field.value = arguments[1]; field.dispatchEvent(new Event("input"))""", name, value)  # fmt: skip


def test_a_file_shows_the_rows_that_the_recipe_takes_and_says_what_it_cannot_know(
    browser: Browser, near: tuple[Any, Any], tmp_path: Path
) -> None:
    loaded, prepared = near
    (tmp_path / "map.html").write_text(explore_page(loaded, prepared), encoding="utf-8")
    browser.open((tmp_path / "map.html").as_uri())
    taken = prepared.selection.indices
    assert browser.js("return fastFt.explorer.taken") == taken and len(taken) == 40
    assert browser.js("return fastFt.map.members") == sorted(taken)
    says = "document.querySelector('#exactness').textContent"
    assert "a run of this recipe takes" in browser.js(f"return {says}")
    change(browser, "at least response words", "6")
    browser.wait(f"{says}.includes('About these rows')")
    assert "leaves out near-duplicates" in browser.js(f"return {says}")
    browser.js("fastFt.explorer.reset()")
    assert browser.js("return fastFt.explorer.taken") == taken


def test_a_served_page_takes_what_select_takes_near_duplicates_and_random_draws_too(
    browser: Browser, near: tuple[Any, Any]
) -> None:
    loaded, prepared = near
    for address in served(explore_page(loaded, prepared, live=True), answer(loaded, prepared)):
        browser.open(address)
        change(browser, "at least response words", "6")
        change(browser, "weight of response words", "0.5")
        browser.wait("document.querySelector('#exactness').textContent.includes('a run with these settings')")
        shown = yaml.safe_load(browser.js("return document.querySelector('#yaml').textContent"))["select"]
        pool = load_pool(loaded.data)
        expected = select(pool, Select(**shown), seed=loaded.seed, limit=None).indices
        assert browser.js("return fastFt.explorer.taken") == expected
        plain = select(pool, Select(**{**shown, "deduplicate": "none"}), seed=loaded.seed, limit=None).indices
        assert expected != plain  # duplicates were there to be left out
        browser.js("fastFt.explorer.select.method = 'random'; fastFt.explorer.update()")
        browser.wait("document.querySelector('#exactness').textContent.includes('a run with these settings')")
        random = Select(**{**shown, "method": "random"})
        drawn = select(pool, random, seed=loaded.seed, limit=None).indices
        assert browser.js("return fastFt.explorer.taken") == drawn != expected
        change(browser, "at least response words", "5000")
        browser.wait("document.querySelector('#exactness').textContent.includes('leaves no row')")
        assert browser.js("return fastFt.explorer.taken") == []


def test_rejected_rows_strata_and_kinds_are_selects_own_in_a_file_and_on_a_served_page(
    browser: Browser, tmp_path: Path
) -> None:
    section = {
        "where": {"response_words": ">= 3"}, "rank_by": {"score": 1.0}, "take": 40, "deduplicate": "none",
        "reject": {"prompt": ["KARAN"], "response": [r"\blo\w+ lo"]},
    }  # fmt: skip
    limits = {"method": "stratified", "strata": {"response_words": [10, 20]}, "diversify": {"verb": 9, "topic": 3}}
    for more in ({}, limits):
        loaded = loader.load_recipe(
            recipe_file(tmp_path / f"r{len(more)}", training_rows(300), select=section | more), []
        )
        prepared = prepare(loaded)
        pool, taken = prepared.selection.pool, prepared.selection.indices
        (tmp_path / "map.html").write_text(explore_page(loaded, prepared), encoding="utf-8")
        browser.open((tmp_path / "map.html").as_uri())
        assert browser.js("return fastFt.explorer.taken") == taken
        shown = yaml.safe_load(browser.js("return document.querySelector('#yaml').textContent"))["select"]
        assert Select(**shown) == loaded.select
        change(browser, "at least response words", "6")
        says = "document.querySelector('#exactness').textContent"
        shown["where"]["response_words"] = ">= 6"
        expected = select(pool, Select(**shown), seed=loaded.seed, limit=None).indices
        assert expected != taken
        if not more:
            browser.wait(f"{says}.includes('a run with these settings')")
            assert browser.js("return fastFt.explorer.taken") == expected, "the page leaves out what a pattern finds"
            assert browser.js("return fastFt.explorer.rejected") and set(
                browser.js("return fastFt.explorer.rejected")
            ) == set(rejected(pool.table, loaded.select.reject))
            continue
        browser.wait(f"{says}.includes('About these rows')")
        assert "of each of its strata" in browser.js(f"return {says}")
        assert "of a verb, an opening or a topic" in browser.js(f"return {says}")
        for address in served(explore_page(loaded, prepared, live=True), answer(loaded, prepared)):
            browser.open(address)
            change(browser, "at least response words", "6")
            browser.wait(f"{says}.includes('a run with these settings')")
            assert browser.js("return fastFt.explorer.taken") == expected


def test_the_rows_taken_are_listed_with_their_prompts_best_rank_first(
    browser: Browser, explorer: tuple[str, Path]
) -> None:
    browser.open(explorer[0])
    browser.wait("[...document.querySelectorAll('.chosen .line')].every((n) => n.textContent !== '…')")
    listed = browser.js("return [...document.querySelectorAll('.chosen .line')].map((n) => [n.title, n.textContent])")
    rows = load_pool(Data(train=str(explorer[1]))).table.to_pylist()
    taken = browser.js("return fastFt.explorer.taken")
    assert listed == [[rows[i]["id"], rows[i]["prompt"]] for i in taken] and len(taken) == 20
    browser.js("document.querySelector('.chosen button').click()")
    browser.wait("document.querySelector('dialog').open")
    assert rows[taken[0]]["id"] in browser.js("return document.querySelector('#row-title').textContent")


def test_the_explorer_marks_spread_scores_and_has_a_colour_for_each_kind_of_row(
    browser: Browser, explorer: tuple[str, Path]
) -> None:
    for dark in (False, True):
        browser.open(explorer[0], dark=dark)
        assert browser.js("return fastFt.map.axisY.text") == "score (equal values spread)"
        shown = browser.js("""return [...document.querySelectorAll("#data-map .key canvas")].map((canvas) =>
            [...canvas.getContext("2d").getImageData(8, 8, 1, 1).data])""")
        assert len(shown) == 3 and all(each[3] == 255 for each in shown)
        ground = browser.js("return css('--card')")
        marks = [tuple(each[:3]) for each in shown]
        assert len(set(marks)) == 3 and all(contrast(mark, ground) >= 3 for mark in marks)
        for one, other in combinations(marks, 2):
            assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 90


def contrast(colour: tuple[int, ...], ground: str) -> float:
    """WCAG's contrast of a colour and a ground such as #1b2027."""

    def luminance(parts: tuple[int, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in parts)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    both = luminance(colour), luminance(tuple(int(ground[i : i + 2], 16) for i in (1, 3, 5)))
    return (max(both) + 0.05) / (min(both) + 0.05)


def test_on_a_phone_the_map_comes_first_and_nothing_is_wider(browser: Browser, explorer: tuple[str, Path]) -> None:
    for width in (390, 1440):
        browser.open(explorer[0], width, 844)
        assert browser.js("return document.documentElement.scrollWidth") <= width
        tops = browser.js("""const top = (id) => document.querySelector(id).getBoundingClientRect().top;
            return ["#map", "#wanted", "#choose", "#chosen"].map(top)""")
        assert (tops == sorted(tops)) == (width == 390)
        beside = browser.js("""const box = (id) => document.querySelector(id).getBoundingClientRect();
            return box("#yaml").top < box("#take").bottom && box("#yaml").left > box("#take").right""")
        assert beside == (width == 1440)


def test_a_comparison_has_all_answers_in_one_row_and_no_overflow(browser: Browser, tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        recipe = recipe_file(
            tmp_path, training_rows(60), output_dir=str(tmp_path / f"run{number}"), lora={"r": 4 + number}
        )
        runs.append(made_run(recipe, TEXTS, better=0.2 + 0.1 * number)[0])
    address = write_comparison(runs, tmp_path / "all.html").as_uri()
    for width, dark in ((1440, False), (390, True)):
        browser.open(address, width, 844, dark)
        assert browser.js("return document.documentElement.scrollWidth") <= width
        tops = browser.js(
            "return [...document.querySelectorAll('.columns .answer')].map((n) => n.getBoundingClientRect().top)"
        )
        assert len(tops) == 4 and (len(set(tops)) == 1) == (width == 1440)
        colours = browser.js("""const shown = (n) => getComputedStyle(n, n.matches(".run") ? "::before" : null);
            const marks = [...document.querySelectorAll("#runs .big .run, .answer h4.run")];
            return marks.map((n) => shown(n).backgroundColor)""")
        assert colours[:3] == colours[3:] and len(set(colours)) == 3
        key = browser.js("return document.querySelector('#curves .key').textContent")
        assert all(f"run{number}" in key for number in range(3))
    assert browser.js("return document.querySelectorAll('.u-legend').length") == 0


def test_the_explorer_has_no_two_parts_of_one_name(browser: Browser, explorer: tuple[str, Path]) -> None:
    browser.open(explorer[0])
    ids = browser.js("return [...document.querySelectorAll('[id]')].map((n) => n.id)")
    assert len(ids) == len(set(ids))
    levels = browser.js("return [...document.querySelectorAll('main h2')].map((n) => n.textContent)")
    assert levels == ["The data map", "Rows to take", "Limits and weights", "The rows taken"]


def test_watch_shows_a_run_as_it_goes_on(browser: Browser, tmp_path: Path) -> None:
    folder, _ = made_run(recipe_file(tmp_path, training_rows(60)), ["a", "b"])
    lines = folder.log.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.update(phases={})
    folder.log.write_text("".join(lines[:15]), encoding="utf-8")
    page_of_run = watch_page(folder)
    for address in served(page_of_run, watcher(folder)):
        browser.open(address, 390, 844)
        text = browser.js("return document.querySelector('#watch').innerText")
        assert "15 of 50" in text and "GPU memory" in text and "training time left" in text
        folder.log.write_text("".join(lines[:30]), encoding="utf-8")
        browser.wait("document.querySelector('.figures').innerText.includes('30 of 50')")
        assert browser.js("return fastFt.curves.charts[0].plot.data[0].length") == 30
        assert browser.js("return document.documentElement.scrollWidth") <= 390


@needs_real_data
def test_the_1000_longest_rows_of_alpaca(browser: Browser, tmp_path: Path) -> None:
    data = {"train": str(REAL / "filtered_alpaca_1k_longest")}
    model = {"name_or_path": str(tmp_path), "tokenizer": str(REAL / "llama2_tokenizer"), "max_length": 2048}
    loaded = loader.load_recipe(
        recipe_file(
            tmp_path, [], data=data, model=model, select={"take": 100, "rank_by": {"score": 1.0, "response_words": 1.0}}
        ),
        [],
    )
    (tmp_path / "map.html").write_text(explore_page(loaded, prepare(loaded)), encoding="utf-8")
    assert browser.open((tmp_path / "map.html").as_uri()) / browser.slowness() < 3
    assert browser.js("return fastFt.explorer.taken.length") == 100
