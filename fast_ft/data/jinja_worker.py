"""What jinja_sandbox.py starts: renders one template, a line of JSON in and one out. It knows nothing of fast_ft."""

from __future__ import annotations

import json
import sys
from typing import Any

import jinja2.debug  # here, for later no file can be opened
import jinja2.ext
import jinja2.sandbox

MOST_TEXT = 8 << 20  #: characters of one rendered text


def main() -> None:
    template: Any = None
    warm_up()
    confine(int(sys.argv[1]))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if "source" in request:
                template, text = compiled(request["source"]), ""
            else:
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
    """What a template says through raise_exception()."""


def warm_up() -> None:
    """Work and fail once each way, so that what Jinja and Python import only then is there."""
    for source in (r"{{ {'a': '\n'} | tojson }}", "{{ a.b.c }}", "{% if %}"):
        try:
            rendered(compiled(source), {})
        except jinja2.TemplateError as error:
            str(error)


def confine(memory: int) -> None:
    """Bound the memory, and open no file from here on; where the system knows no such limits, the sandbox is all."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))


def compiled(source: str) -> Any:
    """Return the template, as transformers sets Jinja up."""

    def raise_exception(message: str) -> None:
        raise Refused(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.LoopControlExtension]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def rendered(template: Any, values: dict[str, Any]) -> str:
    """Return the text; ValueError where it is longer than MOST_TEXT."""
    pieces, length = [], 0
    for piece in template.generate(**values):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_TEXT:
            raise ValueError(f"more than {MOST_TEXT:,} characters")
    return "".join(pieces)


if __name__ == "__main__":
    main()
