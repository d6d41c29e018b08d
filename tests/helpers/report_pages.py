"""Run folders and rows for the report's tests, made without training, and a headless Chromium to open pages in."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fast_ft.common import atomic_files
from fast_ft.data.examples import Pool
from fast_ft.data.prepare import PreparedData, prepare
from fast_ft.recipe import loader
from fast_ft.run.folder import RunDir
from tests.helpers.parts import POCKET
from tests.helpers.patience import wait_until

#: Text that becomes markup, script or a template slot wherever somebody forgets to escape it.
EVIL = [
    "<script>window.xss=1</script>",
    "</script><script>window.xss=2</script>",
    "<img src=x onerror=window.xss=3>",
    '"><svg onload=window.xss=4>',
    "' onmouseover='window.xss=5",
    "javascript:window.xss=6",
    "{{script}} {{data}} ${window.xss=7}",
    "<!-- --!> <![CDATA[ ]]> &lt;b&gt; &#x3C;b&#x3E;",
    "</title></style></textarea><iframe srcdoc='<script>parent.xss=8</script>'>",
    "<a href='http://198.51.100.1/'>x</a><link rel=stylesheet href=//198.51.100.1/a.css>",
    "\u202eright to left\u202c \u2028 \u2029 \x00 \x1b[31m \U0001f600 e\u0301",
    "<!--<script>window.xss=10</script>--><!-- </script --><script>window.xss=10//",
    "<base href=http://198.51.100.1/><meta http-equiv=refresh content='0;url=http://198.51.100.1/'>",
    "<form action=http://198.51.100.1/><input autofocus onfocus=window.xss=11><button formaction=javascript:xss=11>",
    "<style>@import '//198.51.100.1/a.css'; * { background: url(http://198.51.100.1/b) }</style>",
    "<math><mtext></mtext><mglyph><style><!--</style><img title='--><img src onerror=window.xss=12>'>",
    "<svg><animate onbegin=window.xss=13 attributeName=x dur=1s><use href='data:image/svg+xml,<svg onload=xss=13>'>",
    "<details open ontoggle=window.xss=14><video><source onerror=window.xss=14></video></details>",
    "<object data=http://198.51.100.1/x></object><embed src=//198.51.100.1/y><portal src=//198.51.100.1/z>",
    "__proto__ constructor.constructor('window.xss=15')() [object Object] \\u003cscript\\u003ewindow.xss=15",
    "%3Cscript%3Ewindow.xss=16%3C/script%3E &#60;script&#62;window.xss=16&#60;/script&#62; \\x3cscript\\x3e",
    "\x1b]8;;http://198.51.100.1/\x07link\x1b]8;;\x07 \x1b[2J \x9b31m \x1b]52;c;ZQ==\x07 \r\b\x7f",
]
WORDS = np.array([a + b + c for a in ("ka", "lo", "mi", "ne") for b in ("ra", "sti", "vu", "do") for c in "nstl"] * 25)


def training_rows(count: int, evil: bool = False) -> list[dict[str, Any]]:
    """FastChat rows of our own; every fifth has no score, every 97th no response."""
    generator = np.random.default_rng(5)
    rows = []
    for i in range(count):
        prompt = " ".join(generator.choice(WORDS, 3 + i % 9))
        answer = "" if i % 97 == 13 else " ".join(generator.choice(WORDS, int(generator.integers(1, 40)))) + ".!"[i % 2]
        if evil:
            prompt, answer = f"{prompt} {EVIL[i % len(EVIL)]}", f"{EVIL[(i * 3) % len(EVIL)]} {answer}"
        score = None if i % 5 == 4 else float(generator.integers(2, 11)) / 2
        id_ = f"r{i}{EVIL[i % len(EVIL)] if evil else ''}"
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
        rows.append({"id": id_, "conversations": turns, **({} if score is None else {"score": score})})
    return rows


def big_pool(count: int) -> Pool:
    """A pool of many rows, of texts as long as Alpaca's."""
    generator = np.random.default_rng(6)
    lengths = np.clip(generator.lognormal(3.9, 0.8, count), 3, 700).astype(int)
    stream = " ".join(generator.choice(WORDS, 40_000))
    starts = generator.integers(0, len(stream) - 6000, count)
    answers = [stream[s : s + 7 * n].strip() + "." for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    prompts = [stream[s : s + 90].strip() for s in (starts // 2).tolist()]
    scores = generator.choice([2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0], count)
    table = pa.table(
        {"id": [f"row-{i}" for i in range(count)], "prompt": prompts, "response": answers, "score": scores}
    )
    return Pool(table, "big", "0")


def recipe_file(folder: Path, rows: list[dict[str, Any]], name: str = "small.yaml", **changes: Any) -> Path:
    """Write rows and a recipe on the pocket tokenizer; changes replace whole sections."""
    folder.mkdir(parents=True, exist_ok=True)
    train = folder / "train.json"
    train.write_text(json.dumps(rows), encoding="utf-8")
    content = {
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(POCKET), "max_length": 512, "backend": "peft"},
        "data": {"train": str(train)},
        "select": {"where": {"score": ">= 2"}, "rank_by": {"score": 1.0, "response_words": 0.5}, "take": 20},
        "curriculum": {"stages": [{"name": "easy", "upto": 0.5}, {"name": "all", "upto": 1.0}]},
        "train": {"num_train_epochs": 10},
        "budget": {"memory_gib": 14.0, "train_minutes": 2.0},
        **changes,
    }
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def made_run(recipe: Path, texts: list[str], better: float = 0.5) -> tuple[RunDir, PreparedData]:
    """A run folder as a finished run leaves it: `texts` stand in prompts, answers, references and the judge's words."""
    loaded = loader.load_recipe(recipe, [])
    prepared = prepare(loaded)
    folder = RunDir.open(loaded, recipe)
    folder.update(
        rows=[{"id": e.id, "digest": e.digest} for e in prepared.examples],
        stages=[{"name": s.name, "ids": [e.id for e in s.examples]} for s in prepared.stages],
        notes=[*prepared.notes, *texts], environment={"python": "3.11", "packages": {"torch": "2.13.0"}, "gpu": None},
    )  # fmt: skip
    generator = np.random.default_rng(7)
    lines: list[dict[str, Any]] = [
        {"stage": "easy" if step <= 12 else "all", "step": step, "loss": float("nan") if step == 3 else 3 / step**0.5,
         "grad_norm": float(generator.uniform(0.3, 2)), "learning_rate": 1e-4 * (1 - step / 41), "tokens": 900,
         "supervised_tokens": 500, "seconds": 0.5, "gib": 9.0 + step / 100, "skipped": step == 3}
        for step in range(1, 41)
    ]  # fmt: skip
    folder.log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    ids = [f"t{i}" for i in range(len(texts))]
    pred, base, before, ends = {}, {}, {}, {}
    tuned: dict[str, dict[str, Any]] = {}
    for i, (id_, text) in enumerate(zip(ids, texts, strict=True)):
        turns = [{"role": "user", "content": f"Prompt {i}: {text}"}]
        pred[id_] = {"input": turns, "output": [f"Tuned {i}: {text}"]}
        base[id_] = {"input": turns, "output": [f"Base {i}: {text}"]}
        tuned[id_] = {"score": float(round(1 + better * (i * 7 % 18), 1)), "reply": f"1 9\nWords: {text}"}
        before[id_] = {"score": 3.0, "reply": "3 9"}
        ends[id_] = {"tokens": 10 + i, "ended": i % 3 != 0}
    atomic_files.write_json(folder.pred, pred)
    atomic_files.write_json(folder.base_pred, base)
    atomic_files.write_json(folder.answers, {"tuned": ends, "base": ends})
    mean = sum(each["score"] for each in tuned.values()) / len(tuned)
    scores = {
        "kind": "openai",
        "scale": [1, 10],
        "mean": mean,
        "prompts": tuned,
        "base": {"mean": 3.0, "prompts": before},
    }
    atomic_files.write_json(folder.scores, scores)
    folder.finish("train", 20.0, peak_gib=9.4, last_loss=lines[-1]["loss"])
    folder.finish("generate", 5.0, decoding_seconds=4.0)
    return folder, prepared


#: Milliseconds of a piece of work in Browser.slowness, on the machine that the bars of seconds were set on.
REFERENCE = 5.0


class Browser:
    """A headless Chromium, driven through the DevTools protocol where selenium has no word for it."""

    def __init__(self) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = chromium() or ""
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.js = self.driver.execute_script

    def open(self, address: str, width: int = 1440, height: int = 900, dark: bool = False) -> float:
        """Open a page and return the seconds until it is ready to be used."""
        phone = width < 600
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.logs()
        began = time.monotonic()
        self.driver.get(address)
        self.wait("typeof fastFt !== 'undefined' && fastFt.ready && (!fastFt.map || fastFt.map.plot)")
        return time.monotonic() - began

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        wait_until(
            lambda: self.js(f"return Boolean({condition})"),
            what=lambda: f"{condition}; console: {self.driver.get_log('browser')}",
        )

    def slowness(self, share: float = 0.5) -> float:
        """Return how many times longer than REFERENCE a page here takes for the same work; 1 where it is faster.

        The seconds of a page are the wall's: beside other tests the browser waits for a core, and its bars with it. Of
        twenty pieces of work, the one counts than which this share are faster.
        """
        took = self.js("""const times = [];
            for (let k = 0; k < 20; k++) {
                const began = performance.now();
                const rows = Array.from({ length: 20000 }, (_, i) => (i * 48271) % 65537);
                rows.sort((a, b) => a - b);
                times.push(performance.now() - began);
            }
            return times.sort((a, b) => a - b)""")
        return max(1.0, took[int(share * len(took))] / REFERENCE)

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Send a mouse event at CSS pixels x and y."""
        buttons = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, **buttons)

    def keys(self, *keys: str) -> None:
        """Press keys, given by selenium's names or as letters, at what has the focus."""
        from selenium.webdriver.common.keys import Keys

        for key in keys:
            self.driver.switch_to.active_element.send_keys(getattr(Keys, key, key))

    def logs(self) -> tuple[list[str], list[str]]:
        """Console messages and addresses asked for since the last call."""
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        return [entry["message"] for entry in self.driver.get_log("browser")], asked


def chromium() -> str | None:
    """The browser's path, or None; without a driver it is of no use."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    return next(filter(None, found), None) if shutil.which("chromedriver") else None
