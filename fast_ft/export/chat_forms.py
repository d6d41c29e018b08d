"""The prompt templates of ours as other programs write them: Jinja for transformers and vLLM, Go for Ollama.

Both give the text whose tokens training saw. A template that the tokenizer brought itself needs neither.
"""

from __future__ import annotations

#: The recipe's model.template -> a chat template in Jinja, as transformers renders it.
JINJA = {
    "llama-2": (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}"
        "{%- set turns = messages[1:] -%}"
        "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
        "{%- for turn in turns -%}"
        "{%- if (turn['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{- raise_exception('Turns go user, assistant, user, ...') -}}{%- endif -%}"
        "{%- if turn['role'] == 'user' -%}"
        "{{- bos_token + '[INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + turn['content'] + eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
}
#: The same in Ollama's language, and the texts that end an answer.
GO = {
    "llama-2": (
        "[INST] {{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}{{ .Prompt }} [/INST]",
        ("[INST]", "[/INST]"),
    ),
}
