"""A tokenizer's chat template is a stranger's program: it renders text, and can do nothing else, nor for long."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fast_ft.common.errors import InputError
from fast_ft.data import jinja_sandbox
from fast_ft.data.jinja_sandbox import SandboxedTemplate
from tests.helpers.parts import ROOT

HI = [{"role": "user", "content": "hi"}]

#: Ways out of Jinja that were published or are plain to try, and programs that only cost.
CODE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch OWNED').read() }}",
    "{{ lipsum.__globals__['os'].system('touch OWNED') }}",
    "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__.co_consts }}",
    "{{ ('%s' | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{% set f = '{0.__globals__}'.format %}{{ f(raise_exception) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% extends '/etc/passwd' %}",
    "{{ environment.loader }}{{ config }}{{ request.application.__globals__ }}",
    "{{ messages.append('x') }}",
    "{{ messages[0].update(content='x') }}",
]


@pytest.mark.parametrize("source", CODE, ids=range(len(CODE)))
def test_a_chat_template_runs_no_code_and_reads_no_file(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_marked")
    try:
        text = SandboxedTemplate(source, "evil").render(HI)
    except InputError as error:
        text = str(error)
    assert not any(word in text for word in ("root:", "hf_marked", "<class", "subprocess", "built-in")), text
    assert os.listdir(tmp_path) == []  # noqa: PTH208


COSTS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 * messages | length)) }}",
    "folded power": "{{ 9 ** (9 ** 9) }}",
    "text": "{{ ('a' * 99999999999) | length }}",
    "doubling": "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "width": "{{ 'a'.ljust(99999999999) | length }}",
    "format": "{{ '%99999999999d' | format(1) | length }}",
    "output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "indices": "{{ messages" + "[0]" * 20_000 + " }}",
}


@pytest.mark.parametrize("case", COSTS)
def test_a_chat_template_is_bounded_in_time_and_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"evil: its chat template .*Use model\.template: llama-2"):
        SandboxedTemplate(COSTS[case], "evil").render(HI)
    assert time.monotonic() - started < 120  # two waits and two starts, on a busy machine; without a bound, hours


def test_after_its_end_a_template_says_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = SandboxedTemplate("{% if messages[1] is defined %}" + COSTS["loops"] + "{% endif %}ok", "sly")
    assert template.render(HI) == "ok"
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 0.5)
    for _ in range(2):
        with pytest.raises(InputError, match=r"took more than 0\.5 s"):
            template.render(HI * 2)


def test_the_start_of_the_process_is_no_part_of_a_templates_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, program = tmp_path / "slow.py", str(ROOT / "fast_ft" / "data" / "jinja_worker.py")
    slow.write_text(f"import runpy, time\ntime.sleep(1.2)\nrunpy.run_path({program!r}, run_name='__main__')\n")
    monkeypatch.setattr(jinja_sandbox, "_PROGRAM", slow)
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 1.0)
    assert SandboxedTemplate("{{ messages[0].content }}", "x").render(HI) == "hi"
    slow.write_text("raise SystemExit(1)")
    with pytest.raises(InputError, match="took more than"):
        SandboxedTemplate("x", "x")


def test_the_process_has_no_keys_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-marked")
    template = SandboxedTemplate("{{ messages[0].content }}", "x")
    assert template.render(HI) == "hi"
    proc = Path(f"/proc/{template._process.pid}")
    if not proc.is_dir():
        pytest.skip("no /proc here")
    assert b"marked" not in (proc / "environ").read_bytes() + (proc / "cmdline").read_bytes()
    limits = (proc / "limits").read_text()
    assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max open files")] == ["3"]
    pid = template._process.pid
    del template
    assert not Path(f"/proc/{pid}").exists(), "the process ends with its template"


def test_too_long_a_template_is_not_compiled() -> None:
    with pytest.raises(InputError, match=r"at most 200,000 are read"):
        SandboxedTemplate("x" * 200_001, "long")
