"""Miniature chat templates of our own, each with one habit of real ones that masks went wrong on."""

from __future__ import annotations

from tests.templates.sources import Template

TURN = "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson) ~ '</call>' }}{% endfor %}"
)
EACH = "{% for m in messages %}"

# Name → what the template writes. Families that behave so are named in the comments.
TEXTS = {
    # Files for gemma, vicuna and alpaca that people indent: blanks differ between history and generation prompt.
    "indented": """{% for m in messages %}
        {% if m.role == 'user' %}
            {{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
        {% elif m.role == 'assistant' %}
            {{ '<|im_start|>bot\n' + m.content + '<|im_end|>\n' }}
        {% endif %}
    {% endfor %}
    {% if add_generation_prompt %}
    {{ '<|im_start|>bot\n' }}
    {% endif %}""",
    # The prompt opens a thought that history does not have (DeepSeek-R1, QwQ).
    "prompt opens a thought": (
        f"{EACH}{TURN}{{% endfor %}}{{% if add_generation_prompt %}}"
        f"{{{{ '<|im_start|>assistant\n<think>\n' }}}}{{% endif %}}"
    ),
    # Another answer is opened at the end, asked or not, and it begins as a question does (Llama 3's first template).
    "always opens": EACH
    + "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content ~ '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    # Closed in two steps, by tokens that close other things too (Kimi-K3).
    "two steps": EACH
    + "{{ '<|open|>' ~ m.role ~ '<|sep|>' }}{% if m.role == 'assistant' %}{{ '<|open|>response<|sep|>' ~ m.content ~ "
    "'<|close|>response<|sep|>' }}{% else %}{{ m.content }}{% endif %}{{ '<|close|>message<|sep|><|end_of_msg|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|open|>assistant<|sep|><|open|>response<|sep|>' }}{% endif %}",
    # An answer to a result has no header, and a call has two: as many headers as answers, by chance (R1-Distill-Qwen).
    "headers agree by chance": EACH + "{% if m.role == 'user' %}{{ '<|user|>' ~ m.content }}"
    "{% elif m.role == 'tool' %}{{ '<|out|>' ~ m.content ~ '<|out_end|>' }}"
    "{% elif m.tool_calls %}{{ '<|assistant|><|calls|>' }}{% for c in m.tool_calls %}"
    "{{ c.function.name ~ (c.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|calls_end|></s><|assistant|>' }}{% else %}"
    "{% if loop.previtem and loop.previtem.role != 'tool' %}{{ '<|assistant|>' }}{% endif %}"
    "{{ m.content ~ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    # Splits the content at </think> and keeps the last thought alone (Qwen 3, DeepSeek V3.1).
    "reads thoughts": EACH + "{% set text = m.content %}{% set thought = '' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if thought and loop.last %}{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}"
    "{% endif %}{{ text ~ '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    # Marks what is to be trained and writes no calls (TRL's training templates of Llama 3, Gemma, Phi 3).
    "marked, no calls": EACH
    + "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content ~ '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + PROMPT,
    # Marks the header too (TRL's of gpt-oss and DeepSeek V3).
    "marked with header": EACH + "{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|start|>assistant<|message|>' ~ m.content ~ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}",
    # Nothing behind the last answer; the next role's token ends the others (GLM-4, ChatGLM3).
    "no end": EACH
    + "{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}"
    + CALLS
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # Nothing behind the last answer, a token of its own behind the others (Apertus, Apriel, Hy3).
    "no last end": EACH + "{% if m.role == 'assistant' %}{{ '<|assistant_start|>' ~ m.content }}"
    "{% if not loop.last %}{{ '<|assistant_end|>' }}{% endif %}"
    "{% else %}{{ '<|user_start|>' ~ m.content ~ '<|user_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}",
    # Joins the arguments as text (DeepSeek V3, Functionary).
    "arguments as text": EACH + "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments + '</call>' }}"
    "{% endfor %}{{ m.content ~ '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    # Keeps what is thought about the last question alone (Qwen 3).
    "forgets thoughts": EACH + "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% if m.reasoning_content and loop.last %}"
    "{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n\n' }}"
    "{% endif %}{{ m.content }}" + CALLS + "{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    # Joins messages of the same role.
    "merges": EACH + "{% if loop.previtem and loop.previtem.role == m.role %}{{ '\n\n' }}"
    "{% else %}{{ '<|' ~ m.role ~ '|>' }}{% endif %}{{ m.content }}"
    "{% if not loop.nextitem or loop.nextitem.role != m.role %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    # What the system says stands in the first question, and each exchange begins anew (Llama 2).
    "bos per exchange": EACH
    + "{% if m.role == 'user' %}{{ '<s>[INST] ' }}{% if loop.previtem and loop.previtem.role == 'system' %}"
    "{{ '<<SYS>>\n' ~ loop.previtem.content ~ '\n<</SYS>>\n\n' }}"
    "{% endif %}{{ m.content ~ ' [/INST]' }}{% elif m.role == 'assistant' %}"
    "{{ ' ' ~ m.content ~ ' </s>' }}{% endif %}{% endfor %}",
    # What the system says stands in front of the last question (Mistral v3).
    "system in the last question": "{% set said = messages[0].content if messages[0].role == 'system' else '' %}"
    "{{ '<s>' }}" + EACH + "{% if m.role == 'user' %}{{ '[INST]' }}{% if said and loop.revindex <= 2 %}"
    "{{ said ~ '\n\n' }}{% endif %}{{ m.content ~ '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}",
    # A call ends with another token than a text (Llama 3.1).
    "two ends": EACH
    + "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content }}"
    + CALLS
    + "{{ '<|eom_id|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    # A second token behind the very last end (Phi 3).
    "ends twice": EACH
    + "{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}"
    + CALLS
    + (
        "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>\n' }}{% else %}{{ '</s>' }}{% endif %}"
    ),
    # Another end in the middle than at the end, and the one in the middle ends parts of answers too (gpt-oss).
    "parts": EACH + "{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' ~ m.reasoning_content ~ '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content ~ ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    # A call's text behind the call's result (Gemma 4).
    "text behind the result": EACH + "{% if m.role == 'tool' %}{{ '<|out|>' ~ m.content ~ '<out|>' }}"
    "{% if loop.previtem.content %}{{ loop.previtem.content ~ '<turn|>\n' }}{% endif %}"
    "{% else %}{% if not (loop.previtem and loop.previtem.role == 'tool') %}"
    "{{ '<|turn>' ~ m.role ~ '\n' }}{% endif %}{% if m.tool_calls %}"
    + CALLS
    + (
        "{% else %}{{ m.content ~ '<turn|>\n' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn>assistant\n' }}{% endif %}"
    ),
    # No token at all between turns (rwkv-world).
    "no tokens": EACH
    + (
        "{{ ('User: ' if m.role == 'user' else 'Assistant: ') ~ m.content ~ '\n\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    # Writes contents only if they are lists of parts (Idefics, LLaVA).
    "parts of contents": EACH
    + (
        "{{ '<|im_start|>' ~ m.role ~ '\n' }}{% for part in m.content %}{% if part.type == 'text' %}"
        "{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    + PROMPT,
    # Wants nine letters and digits for the id of a call, and turns that alternate (Mistral).
    "nine characters": EACH + "{% if m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS]' ~ m.tool_call_id ~ ' ' ~ m.content ~ '[/TOOL_RESULTS]' }}{% elif m.tool_calls %}"
    "{% for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ '[TOOL_CALLS]' ~ c.function.name ~ (c.function.arguments | tojson) ~ c.id }}{% endfor %}{{ '</s>' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' ~ m.content ~ '[/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ '</s>' }}{% endif %}{% endfor %}",
}

MINIATURES = [Template(name, "miniatures", text) for name, text in TEXTS.items()]
