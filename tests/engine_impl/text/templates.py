"""Small chat templates of the forms that real families have, written for these tests."""

PLAIN = """\
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content }}
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}"""

NO_SYSTEM = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif -%}
<|{{ m.role }}|>{{ m.content | trim }}
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif -%}"""

HERMES = """\
{%- if tools %}<|system|>Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
{% endif -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<|user|><tool_response>{{ m.content }}</tool_response>
{% else -%}
<|{{ m.role }}|>{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}
{% endif -%}
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif -%}
{%- endif -%}"""

LLAMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif -%}
<|start|>system|{{ system }}
{%- if tools %}Answer with {"name": function name, "parameters": its arguments}.{% for t in tools %}
{{ t | tojson(indent=4) }}{% endfor %}{% endif %}<|eot|>
{%- for m in messages -%}
{%- if m.tool_calls -%}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('only single calls') }}{% endif -%}
<|start|>assistant|{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot|>
{%- elif m.role == 'tool' -%}
<|start|>ipython|{{ m.content | tojson }}<|eot|>
{%- else -%}
<|start|>{{ m.role }}|{{ m.content | trim }}<|eot|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant|{% endif -%}"""  # noqa: E501

MISTRAL = """\
{{- bos_token }}
{%- for m in messages -%}
{%- if m.role == 'user' -%}
{%- if tools and loop.last or tools and m == (messages | selectattr('role', 'equalto', 'user') | list | last) -%}
[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif -%}
[INST] {{ m.content }}[/INST]
{%- elif m.tool_calls -%}
[TOOL_CALLS] [
{%- for call in m.tool_calls -%}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
{{ call.function | tojson }}{% if not loop.last %}, {% endif -%}
{%- endfor -%}
]
{%- elif m.role == 'tool' -%}
{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif -%}
[TOOL_RESULTS] {"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.role == 'assistant' %} {{ m.content }}</s>
{%- endif -%}
{%- endfor -%}"""  # noqa: E501

GEMMA = """\
{%- for tool in tools or [] -%}
<start_function_declaration>declaration:{{ tool.function.name }}{description:<escape>{{ tool.function.description }}<escape>,
parameters:{{ tool.function.parameters | tojson }}}<end_function_declaration>
{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
<start_function_response>response:{{ m.name }}{value:<escape>{{ m.content }}<escape>}<end_function_response>
{%- else -%}
<start_of_turn>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] -%}
<start_function_call>call:{{ call.function.name }}{
{%- for key, value in call.function.arguments.items() %}{{ key }}:<escape>{{ value }}<escape>{% endfor -%}
}<end_function_call>
{%- endfor %}<end_of_turn>
{% endif -%}
{%- endfor -%}"""  # noqa: E501

HARMONY = """\
{%- macro kind(schema) -%}
{%- if schema.type == 'object' %}{
{%- for name, inner in (schema.properties or {}).items() %}{{ '\\n' }}
{%- if inner.description %}// {{ inner.description }}{{ '\\n' }}{% endif -%}
{{ name }}{% if name not in (schema.required or []) %}?{% endif %}: {{ kind(inner) }},
{%- endfor %}{{ '\\n}' }}
{%- elif schema.type == 'array' %}{{ kind(schema['items']) }}[]
{%- elif schema.enum %}{{ schema.enum | map('tojson') | join(' | ') }}
{%- else %}{{ schema.type or 'any' }}
{%- endif -%}
{%- endmacro -%}
{%- macro orders() -%}
{%- if model_identity is not defined %}{% set model_identity = 'You are a test.' %}{% endif -%}
{%- if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif -%}
{{ model_identity }}
Today: {{ strftime_now('%Y') }}

Reasoning: {{ reasoning_effort }}

# Channels: analysis, commentary, final.{% if tools %} Functions: commentary.{% endif %}
{%- endmacro -%}
<|start|>system<|message|>{{ orders() }}<|end|>
{%- set rest, said = messages, '' -%}
{%- if messages[0].role == 'system' %}{% set rest, said = messages[1:], messages[0].content %}{% endif -%}
{%- if said or tools -%}
<|start|>developer<|message|>
{%- if said %}# Instructions

{{ said }}

{% endif -%}
{%- if tools %}# Tools

namespace functions {
{%- for t in tools %}{{ '\\n' }}// {{ t.function.description }}
type {{ t.function.name }} = (_: {{ kind(t.function.parameters) }}) => any;
{%- endfor %}{{ '\\n}' }}
{%- endif -%}
<|end|>
{%- endif -%}
{%- set latest = namespace(call=none) -%}
{%- for m in rest -%}
{%- if m.role == 'assistant' -%}
{%- if 'content' in m and '<|channel|>final' in m.content or 'thinking' in m and '<|channel|>analysis' in m.thinking -%}
{{ raise_exception('channels are not for messages') }}
{%- endif -%}
{%- if 'tool_calls' in m -%}
{%- set later = namespace(answers=false) -%}
{%- for other in rest[loop.index:] -%}
{%- if other.role == 'assistant' and 'tool_calls' not in other %}{% set later.answers = true %}{% endif -%}
{%- endfor -%}
{%- if m.content and m.thinking %}{{ raise_exception('one thought before a call') }}{% endif -%}
{%- if (m.content or m.thinking) and not later.answers -%}
<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>
{%- endif -%}
{%- set latest.call = m.tool_calls[0].function -%}
<|start|>assistant to=functions.{{ latest.call.name }}<|channel|>commentary json<|message|>
{{- latest.call.arguments | tojson }}<|call|>
{%- elif loop.last and not add_generation_prompt -%}
{%- if 'thinking' in m %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- set latest.call = none -%}
{%- endif -%}
{%- elif m.role == 'tool' -%}
{%- if latest.call is none %}{{ raise_exception('a result of no call') }}{% endif -%}
<|start|>functions.{{ latest.call.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>
{%- elif m.role == 'user' -%}
<|start|>user<|message|>{{ m.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}"""

OTHER_FORM = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor -%}
{%- for m in messages -%}
<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}@{{ call.function | tojson }}@{% endfor %}
{% endfor -%}"""

LOSES_CALLS = """\
{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor -%}
{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}{% endfor -%}"""

NAMES = "{% for m in messages %}<{{ m.role }} {{ m.name }}>{{ m.content }}{% for d in documents or [] %}[{{ d.text }}]{% endfor %}{% endfor %}"  # noqa: E501
