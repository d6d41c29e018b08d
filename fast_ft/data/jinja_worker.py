"""The process that jinja_sandbox.py starts: it renders one template, and knows nothing of fast_ft."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

import jinja2.debug  # at the top, since later no file can be opened
import jinja2.ext
import jinja2.sandbox

MOST_TEXT = 8 << 20  #: characters of one rendered text


def main() -> None:
    """Print an empty line once all is imported. Answer each line of JSON on stdin, the template first, with another."""
    template: jinja2.Template | None = None
    warm_up()
    confine(int(sys.argv[1]))
    print(flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "source" in request:
                template, text = compiled(request["source"]), ""
            else:
                assert template is not None, "the first request gives the template"
                text = rendered(template, request)
            reply = {"text": text}
        except Refused as error:
            reply = {"error": f"refuses these messages: {error}"[:500]}
        except MemoryError:
            reply = {"error": "takes too much memory"}
        except Exception as error:  # a template can raise anything at all
            verb = "does not compile" if template is None else "fails"
            reply = {"error": f"{verb}: {type(error).__name__}: {error}"[:500]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


class Refused(Exception):
    """The message that a template gives to raise_exception()."""


def warm_up() -> None:
    """Render and fail once in each way, so that all that Jinja and Python import late is imported now."""
    for source in (r"{{ {'a': '\n'} | tojson }}{{ strftime_now('%d %b %Y') }}", "{{ a.b.c }}", "{% if %}"):
        try:
            rendered(compiled(source), {})
        except jinja2.TemplateError as error:
            str(error)


def confine(memory: int) -> None:
    """Limit this process to `memory` bytes and to no new files; a system without such limits has only the sandbox."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what the model writes: its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own attribute)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return a call block, as transformers does, so that what is set inside stays inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


def compiled(source: str) -> jinja2.Template:
    """Return the template, compiled with the settings, filters and functions that transformers gives Jinja."""

    def raise_exception(message: str) -> None:
        """Refuse the messages; templates call it by this name."""
        raise Refused(message)

    def strftime_now(form: str) -> str:
        """Return the date or time of now; templates call it by this name."""
        return datetime.datetime.now().strftime(form)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Return JSON, without the escapes for HTML that Jinja's own filter makes."""
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.LoopControlExtension]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def rendered(template: jinja2.Template, values: dict[str, Any]) -> str:
    """Return the text. Raises ValueError where it has more than MOST_TEXT characters."""
    pieces, length = [], 0
    for piece in template.generate(**values):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_TEXT:
            raise ValueError(f"more than {MOST_TEXT:,} characters")
    return "".join(pieces)


if __name__ == "__main__":
    main()
