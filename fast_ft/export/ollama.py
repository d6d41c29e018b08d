"""A Modelfile: how Ollama serves a GGUF with the template, the ends of answers and the decoding of the recipe."""

from __future__ import annotations

from fast_ft.export.chat_forms import GO
from fast_ft.recipe.schema import Generate


def modelfile(gguf_name: str, template: str, section: Generate) -> str:
    """Return a Modelfile (Ollama's docs/modelfile.md) for the GGUF beside it.

    Without a template of ours, Ollama uses the chat template that the GGUF holds.
    """
    lines = [f"FROM ./{gguf_name}"]
    if template in GO:
        text, ends = GO[template]
        lines += [f'TEMPLATE """{text}"""', *(f'PARAMETER stop "{end}"' for end in ends)]
    values = {
        "temperature": section.temperature if section.do_sample else 0,
        "top_p": section.top_p,
        "top_k": section.top_k,
        "min_p": section.min_p,
        "repeat_penalty": section.repetition_penalty,
        "num_predict": section.max_new_tokens,
    }
    return "\n".join([*lines, *(f"PARAMETER {name} {value:g}" for name, value in values.items())]) + "\n"
