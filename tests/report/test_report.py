"""The report's parts without a browser: what goes into the page, and what may not."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import http.client
import json
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from fast_ft.cli.main import main
from fast_ft.data.encoding import IGNORE_INDEX
from fast_ft.report import result
from fast_ft.report.data_map import NO_GROUP, Group, points
from fast_ft.report.html import STATIC, page, table
from fast_ft.report.run_data import Run, read_run
from fast_ft.report.run_names import named
from fast_ft.report.server import PageServer
from fast_ft.report.write import write_comparison, write_report
from fast_ft.run.artifacts import Scores
from tests.helpers.patience import PATIENCE
from tests.helpers.report_pages import EVIL, big_pool, made_run, recipe_file, training_rows


def block(html: str, name: str) -> bytes:
    """A data block of a page, unpacked."""
    found = re.search(rf'id="block-{name}">([^<]*)<', html)
    assert found, name
    return gzip.decompress(base64.b64decode(found[1]))


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, str]:
    recipe = recipe_file(tmp_path_factory.mktemp("evil"), training_rows(300, evil=True))
    folder, prepared = made_run(recipe, EVIL)
    return folder, prepared, write_report(folder, prepared).read_text(encoding="utf-8")


def test_no_text_of_rows_answers_or_judges_stands_in_the_markup(evil_run: tuple[Any, Any, str]) -> None:
    html = evil_run[2]
    for text in EVIL[:5] + EVIL[8:10]:
        assert text not in html
    blocks = ["facts", "columns", "groups", "text-0", "text-1", "tokens"]
    assert re.findall(r'<script type="[^"]*" id="block-([^"]*)">', html) == blocks
    assert html.count("<script") == html.count("</script>") == len(blocks) + 1


def test_the_homework_warns_and_no_other_recipe_does(tmp_path: Path, evil_run: tuple[Any, Any, str]) -> None:
    head = evil_run[2].split("<main")[0]
    assert evil_run[2].startswith(
        "<!doctype html>\n<!-- This file holds training rows and the model&#x27;s predictions"
    )
    assert "Not to be shared" not in head and "homework" not in head
    folder, _ = made_run(recipe_file(tmp_path, training_rows(60)), ["a", "b"])
    folder.update(recipe=folder.manifest()["recipe"] | {"rules": "ntu-ml-2025-hw5"})
    for path in (write_report(folder), write_comparison([folder, folder], tmp_path / "both.html")):
        head = path.read_text(encoding="utf-8").split("<main")[0]
        assert "Not to be shared" in head and "homework forbids to share either" in head


def test_the_policy_allows_this_script_and_style_and_nothing_else(evil_run: tuple[Any, Any, str]) -> None:
    html = evil_run[2]
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert found and "default-src 'none'" in found[1] and "unsafe" not in found[1]
    for tag in ("script", "style"):
        text = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert len(text) == 1
        assert base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode() in found[1]
    assert not re.search(r'(src|href)="(?!#|data:,)', html.split("<script>")[0])


def test_what_the_page_holds_is_what_the_run_holds(evil_run: tuple[Any, Any, str]) -> None:
    folder, prepared, html = evil_run
    facts = json.loads(block(html, "facts"))
    assert [prompt["id"] for prompt in facts["answers"]["prompts"]] == list(json.loads(folder.pred.read_text()))
    cell = facts["answers"]["prompts"][1]["cells"]
    assert cell[0]["text"] == f"Base 1: {EVIL[1]}" and cell[1]["text"] == f"Tuned 1: {EVIL[1]}"
    assert cell[1]["words"].endswith(EVIL[1]) and cell[1]["ended"] is True
    assert facts["curves"][0]["loss"][2] is None and facts["curves"][0]["cap"] == 14.0  # NaN is no JSON
    groups = block(html, "groups")
    assert sum(g != NO_GROUP for g in groups) == 20
    texts = json.loads(block(html, "text-1"))
    there = prepared.selection.pool.table.slice(256, 1).to_pylist()[0]
    assert texts[0] == [there["id"], there["prompt"], there["response"]]


def test_tokens_are_those_trained_on(evil_run: tuple[Any, Any, str]) -> None:
    _, prepared, html = evil_run
    tokens = json.loads(block(html, "tokens"))
    assert len(tokens) == 20
    for index, example in zip(prepared.selection.indices, prepared.selection.examples, strict=True):
        row, shown = prepared.rows[example.id], tokens[str(index)]
        masked = sum(label == IGNORE_INDEX for label in row.labels)
        assert shown["runs"] == [masked, len(row.labels) - masked] and len(shown["pieces"]) == len(row.input_ids)
        assert shown["controls"] == [0, len(row.input_ids) - 1]


def test_a_run_without_data_judge_or_answers_still_has_a_report(tmp_path: Path) -> None:
    folder, _ = made_run(recipe_file(tmp_path, training_rows(60)), ["a", "b"])
    for name in ("scores.json", "base_pred.json", "answers.json", "pred.json", "train.json"):
        (folder.root / name if name != "train.json" else tmp_path / name).unlink()
    html = write_report(folder).read_text(encoding="utf-8")
    assert "could not be loaded again" in html and "There is no map" in html and "There are no answers yet" in html


def test_changed_rows_are_not_shown_as_those_trained_on(tmp_path: Path) -> None:
    folder, _ = made_run(recipe_file(tmp_path, training_rows(60)), ["a", "b"])
    (tmp_path / "train.json").write_text(json.dumps(training_rows(59)[7:]), encoding="utf-8")
    assert "gives other rows than those that were trained on" in write_report(folder).read_text(encoding="utf-8")


def test_texts_are_cut_to_fit_and_selected_rows_are_not() -> None:
    pool = big_pool(1500)
    found = points(pool, [Group("all", [3, 700])], text_budget=60_000)
    assert sum(len(b) for name, b in found.blocks.items() if name.startswith("text")) <= 60_000
    assert found.facts["shortened"]
    rows = [row for n in range(6) for row in json.loads(gzip.decompress(found.blocks[f"text-{n}"]))]
    assert rows[3][2] == pool.table["response"][3].as_py() and rows[700][2] == pool.table["response"][700].as_py()
    assert max(len(row[2]) for i, row in enumerate(rows) if i not in (3, 700)) <= found.facts["shortened"] + 4


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(20)]
    one, _ = made_run(recipe_file(tmp_path / "one", training_rows(60)), texts)
    two, _ = made_run(recipe_file(tmp_path / "two", training_rows(60), lora={"r": 4}), texts, better=0.25)
    html = write_comparison([one, two], tmp_path / "both.html").read_text(encoding="utf-8")
    assert '<th scope="row">lora.r</th><td>16</td><td>4</td>' in html
    row = re.search(r"run, r 4 scores .*: better on (\d+), equal on (\d+) and worse on (\d+) of 20 prompts", html)
    ours, theirs = ([round(1 + b * (i * 7 % 18), 1) for i in range(20)] for b in (0.25, 0.5))
    pairs = list(zip(ours, theirs, strict=True))
    assert row and [int(n) for n in row.groups()] == [
        sum(a > b for a, b in pairs), sum(a == b for a, b in pairs), sum(a < b for a, b in pairs)
    ]  # fmt: skip


def test_every_table_cell_heading_and_caption_is_escaped() -> None:
    made = table(EVIL[:3], [EVIL[:3], EVIL[3:6], EVIL[6:9]], caption=EVIL[0])
    tags = set(re.findall(r"</?([a-z]+)", made))
    assert tags == {"div", "table", "caption", "thead", "tbody", "tr", "th", "td"}
    cells = re.findall(r'<t[hd](?: scope="[a-z]+")?>(.*?)</t[hd]>', made, re.DOTALL)
    assert [html.unescape(cell) for cell in cells] == [*EVIL[:3], *EVIL[:9]]


def test_names_and_values_of_runs_are_text_in_a_comparison(tmp_path: Path) -> None:
    evil = tmp_path / "<b>one & <i>two"
    one, _ = made_run(recipe_file(evil, training_rows(60), output_dir=str(evil / "<u>run")), ["a", "b"])
    two, _ = made_run(recipe_file(tmp_path / "two", training_rows(60)), ["a", "b"])
    made = write_comparison([one, two], tmp_path / "both.html").read_text(encoding="utf-8")
    assert not re.search(r"<[biu]>", made)
    assert '<th scope="col" class="run g0">&lt;u&gt;run</th>' in made
    assert f"<td>{html.escape(str(evil / 'train.json'))}</td>" in made


@pytest.mark.pictures
def test_the_command_line_writes_reports_and_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_file(tmp_path, training_rows(60))
    folder, _ = made_run(recipe, ["a", "b"])
    assert main(["report", str(folder.root)]) == 0
    assert all((folder.root / name).stat().st_size > 5000 for name in ("report.html", "map.png", "loss.png"))
    assert main(["data", str(recipe), "--explore", "--output", str(tmp_path / "map.html")]) == 0
    assert json.loads(block((tmp_path / "map.html").read_text(), "facts"))["explore"]["select"]["take"] == 20
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no such run folder" in capsys.readouterr().err


def test_the_server_answers_on_this_machine_by_its_name_only() -> None:
    server = PageServer("<p>rows</p>")
    address = server.address
    Thread(target=server.serve_forever, daemon=True).start()

    def get(url: str, host: str | None = None, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(url, headers={"Host": host, **headers} if host else headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, gzip.decompress(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, b""

    try:
        assert server.server_address[0] == "127.0.0.1"
        assert get(address) == (200, b"<p>rows</p>")
        assert get(address, f"localhost:{server.server_port}")[0] == 200
        assert get(address, "evil.example")[0] == 421
        assert get(address, f"evil.example:{server.server_port}")[0] == 421
        assert get(f"http://127.0.0.1:{server.server_port}/")[0] == 404
        here = f"127.0.0.1:{server.server_port}"
        assert get(address, here, Origin=f"http://{here}")[0] == 200
        for origin in ("http://evil.example", "null", f"https://{here}", "http://127.0.0.1:1", ""):
            assert get(address, here, Origin=origin) == (403, b""), origin
        twice = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
        twice.putrequest("GET", address.split(str(server.server_port))[1], skip_host=True)
        for host in (here, "evil.example"):
            twice.putheader("Host", host)
        twice.endheaders()
        assert twice.getresponse().status == 421
        twice.close()
    finally:
        server.shutdown()
        server.server_close()


def test_colours_have_the_contrast_that_wcag_aa_asks() -> None:
    css = (STATIC / "report.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media", 2)[:2])

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(theme: dict[str, str], a: str, b: str) -> float:
        high, low = sorted((luminance(theme[a]), luminance(theme[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (light, dark):
        for text, ground in [
            *((text, ground) for text in ("ink", "soft", "accent") for ground in ("ground", "card", "accent-ground")),
            ("warn", "warn-ground"), ("good", "card"), ("bad", "card"), ("ink", "good-ground"), ("good", "good-ground"),
            ("good", "accent-ground"), ("bad", "accent-ground"),
        ]:  # fmt: skip
            assert contrast(theme, text, ground) >= 4.5, (text, ground)
        for mark in ("edge", "g0", "g1", "g2", "g3", "g4", "g5"):
            assert contrast(theme, mark, "card") >= 3, mark


#: How a script makes markup or code of text, or asks a server. Not even a comment may name one: nothing is stripped.
FORBIDDEN = (
    "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "fetch(",
    "XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon",
)  # fmt: skip


def forbidden(script: str) -> list[str]:
    return [word for word in FORBIDDEN if word in script]


def test_our_scripts_make_no_markup_of_data() -> None:
    paths = list(STATIC.glob("*.js"))
    assert len(paths) > 5
    found = {path.name: forbidden(path.read_text(encoding="utf-8")) for path in paths}
    # Only a page that this machine's server sent asks that server; html.page leaves ask.js out of all others.
    assert found == {path.name: [] for path in paths} | {"ask.js": ["fetch("]}
    assert forbidden('const at = "https://example.org"; at.innerHTML = row;') == ["innerHTML"]


@pytest.mark.parametrize("live", [False, True])
def test_only_a_page_from_the_server_may_ask_it(live: bool) -> None:
    html = page("a", "b", [], {"live": True} if live else {}, {})
    assert ("fetch(" in html) == ("connect-src 'self'" in html) == live


def test_slots_in_data_are_not_filled() -> None:
    html = page("{{script}}", "{{data}}", [("a", "{{style}}", "<p>{{title}}</p>")], {}, {})
    assert html.count("{{script}}") == 2 and "<p>{{title}}</p>" in html


def test_the_result_comes_first_with_both_scores_their_intervals_and_the_judge(evil_run: tuple[Any, Any, str]) -> None:
    folder, _, html = evil_run
    first = html.split("<section")[1]
    assert first.startswith(' id="result"') and re.findall(r'<section id="(\w+)"', html) == [
        "result", "training", "map", "answers", "settings"
    ]  # fmt: skip
    scores = json.loads(folder.scores.read_text())
    assert re.findall(r'<p class="value">([^<]*)</p>', first) == [f"{scores['mean']:.2f}", "3.00"]
    assert "The tuned model scores" in first and "95 % interval" in first and first.count("no interval:") == 2
    assert "Measure: the mean score" in first and "from 1 to 10" in first and "Judge: " in first
    assert first.count('<article class="sample">') == 3


@pytest.mark.parametrize("value, low, high, said", [
    (0.84, 0.77, 0.91, "95 % interval 77\u00a0% to 91\u00a0%"), (0.5, None, None, "no interval: too few answers"),
])  # fmt: skip
def test_a_share_is_said_in_percent(value: float, low: float | None, high: float | None, said: str) -> None:
    scores = Scores(kind="reference", mean=value, low=low, high=high, count=100 if low else 4)
    assert (
        result.shown(scores, value) == f"{value:.0%}".replace("%", "\u00a0%")
        and result.interval(scores, scores) == said
    )
    ours, theirs = ({f"p{i}": float(i < n) for i in range(40)} for n in (30, 10))
    told = result.difference(scores, "One", ours, "other", theirs)
    assert told.startswith("One scores 50 percentage points more than other, which is more than noise (95 % interval +")
    assert told.endswith("better on 20, equal on 20 and worse on 0 of 40 prompts.")


def test_a_run_on_a_cpu_has_no_row_on_gpu_memory(tmp_path: Path) -> None:
    folder, _ = made_run(recipe_file(tmp_path, training_rows(60)), ["a", "b"])
    assert "GPU memory, GiB" in write_report(folder).read_text(encoding="utf-8").split("<script")[0]
    folder.finish("train", 20.0, peak_gib=0.0, last_loss=1.0)
    assert "GPU memory" not in write_report(folder).read_text(encoding="utf-8").split("<script")[0]


def test_runs_have_the_names_that_a_person_gave_or_that_tell_the_difference(tmp_path: Path) -> None:
    def read(name: str, **changes: Any) -> Run:
        recipe = recipe_file(tmp_path, training_rows(60), output_dir=str(tmp_path / name), **changes)
        return read_run(made_run(recipe, ["a"])[0])

    mine, auto, other = read("mine"), read("small-0123abcd"), read("small-4567abcd", lora={"r": 4})
    assert [run.name for run in named([mine, auto, other])] == ["mine", "small, r 16", "small, r 4"]
    called = replace(other, recipe=other.recipe | {"run_name": "Low rank"})
    assert [run.name for run in named([mine, called])] == ["mine", "Low rank"]
    assert [run.name for run in named([mine, mine])] == ["mine (1)", "mine (2)"]


def test_each_run_has_one_colour_in_tables_curves_answers_and_map(tmp_path: Path) -> None:
    rows = training_rows(60)
    one, _ = made_run(recipe_file(tmp_path / "one", rows, output_dir=str(tmp_path / "a")), ["a", "b"])
    select = {"where": {"score": "<= 4"}, "take": 12}
    shutil.copy(tmp_path / "one" / "train.json", tmp_path / "train.json")
    two, _ = made_run(recipe_file(tmp_path, rows, output_dir=str(tmp_path / "b"), select=select), ["a", "b"])
    made = write_comparison([one, two], tmp_path / "both.html").read_text(encoding="utf-8")
    facts = json.loads(block(made, "facts"))
    assert re.findall(r'class="run (g\d)">([^<]*)<', made.split("<script")[0]) == [("g0", "a"), ("g1", "b")] * 3
    assert [run["name"] for run in facts["curves"]] == ["a", "b"]
    tuned = [column for column in facts["answers"]["columns"] if column["kind"] == "tuned"]
    assert [(column["name"], column["colour"]) for column in tuned] == [("a", 0), ("b", 1)]
    colours = {group["name"]: group["colour"] for group in facts["map"]["groups"]}
    assert colours == {"in several runs": -1, "only in a": 0, "only in b": 1}


def test_the_server_answers_questions_of_its_own_page_only() -> None:
    server = PageServer("<p>rows</p>", lambda asked: {"asked": asked})
    address = server.address
    here = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()

    def ask(body: bytes, **headers: str) -> tuple[int, Any]:
        given = {
            "Content-Type": "application/json",
            "Origin": here,
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        request = urllib.request.Request(address, body, {name: value for name, value in given.items() if value})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.loads(gzip.decompress(answer.read()))
        except urllib.error.HTTPError as error:
            return error.code, None

    try:
        assert ask(b'{"steps": 3}') == (200, {"asked": {"steps": 3}})
        assert ask(b"{") == (400, None)
        assert ask(b"{}", Origin="http://evil.example") == (403, None)
        assert ask(b"{}", Origin="") == (403, None)
        assert ask(b"{}", Content_Type="text/plain") == (403, None)  # what a form of another site can send
        assert ask(b"{}", Host="evil.example") == (421, None)
        for length in (200_000, 8_000_000):  # the second is more than the system takes off a client beforehand
            assert ask(b"[" * length)[0] == 413
    finally:
        server.shutdown()
        server.server_close()
