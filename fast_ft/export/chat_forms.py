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
    "llama-3.1": (
        "{%- if messages[0]['role'] == 'system' -%}"
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
        "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
        "{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n"
        "Today Date: 26 July 2024\\n\\n' + system + eos_token -}}"
        "{%- for turn in turns -%}"
        "{%- set role = 'ipython' if turn['role'] == 'tool' else turn['role'] -%}"
        "{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' + turn['content'] + eos_token -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
}
#: The same in Ollama's language, and the texts that end an answer.
GO = {
    "llama-2": (
        "[INST] {{ if .System }}<<SYS>>\n{{ .System }}\n<</SYS>>\n\n{{ end }}{{ .Prompt }} [/INST]",
        ("[INST]", "[/INST]"),
    ),
    "llama-3.1": (
        "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 July 2024\n\n{{ .System }}</s><|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}</s>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|start_header_id|>",),
    ),
}
