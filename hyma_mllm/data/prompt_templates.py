"""Chat templates: the plain one for base models, and what every template gets in front of it before it is used.

A chat template is a jinja program. The additions are jinja too, so that one string serves training, generation and
the exported directory, where nothing but that string is left of this module.
"""

from typing import Any

from jinja2 import TemplateError

from hyma_mllm.errors import HymaError

IMAGE_TOKEN = "<image>"
"""What stands for the picture in a prompt; LLaVA's own spelling."""

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set text = message['content'] -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- text + '\\n\\n' -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- if text.startswith('<image>\\n') -%}"
    "{{- '<image>\\n' -}}{%- set text = text[8:] -%}"
    "{%- endif -%}"
    "{{- 'Question: ' + text + '\\n' -}}"
    "{%- else -%}"
    "{{- 'Answer: ' + text + eos_token + '\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Answer:' -}}{%- endif -%}"
)
"""For base models, which come without a template: the picture, `Question: ...`, `Answer: ...` and the end token."""

# Multimodal callers hand over lists of parts; a text template knows strings only.
_FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if content is defined and content is iterable and content is not string -%}"
    "{%- set joined = namespace(text='') -%}"
    "{%- for part in content -%}"
    "{%- set joined.text = joined.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': joined.text}] -%}"
    "{%- else -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)

# Free variables of published templates whose default is not the same every day, or asks for a monologue first.
_FIXED = {"date_string": "'26 Jul 2024'", "enable_thinking": "false"}


def own_template(tokenizer: Any, name: str) -> str:
    """The tokenizer's chat template, or the plain one if it has none.

    Args:
        tokenizer: a transformers tokenizer.
        name: of the model, for error messages.

    Raises:
        HymaError: if there are several templates and none is the default, or no end token for the plain one.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise HymaError(
                f"The tokenizer of {name} has the chat templates {', '.join(sorted(template))} and no default; "
                "set tokenizer.chat_template to one of them."
            )
        template = template["default"]
    if template:
        return str(template)
    if tokenizer.eos_token is None:
        raise HymaError(
            f"The tokenizer of {name} has neither a chat template nor an end token; set its eos_token, "
            "which ends an answer."
        )
    return PLAIN_TEMPLATE


def complete(template: str, system: str | None = None, bos: bool = False) -> str:
    """`template` behind the additions: contents given as lists of parts, fixed variables, a system prompt, bos.

    Args:
        template: jinja source of a text template.
        system: the system prompt of conversations that bring none; None leaves that to the template.
        bos: whether to write the beginning-of-sequence token, for a template that leaves it to the tokenizer.
    """
    added = _FLATTEN
    for variable, value in _FIXED.items():
        if variable in template:
            added += "{%- set " + variable + " = " + value + " -%}"
    if system is not None:
        # Python's ascii() is a literal that jinja reads back unchanged, whatever quotes and braces stand in it.
        message = "{'role': 'system', 'content': " + ascii(system) + "}"
        added += "{%- if messages[0]['role'] != 'system' -%}"
        added += "{%- set messages = [" + message + "] + messages -%}{%- endif -%}"
    # An expression last: a block tag would eat white space with which the template may begin.
    return added + ("{{- bos_token }}" if bos else "{{- '' }}") + template


def render(tokenizer: Any, template: str, messages: list[dict[str, str]], generate: bool, name: str) -> str:
    """A conversation as text.

    Args:
        tokenizer: a transformers tokenizer, for its special tokens.
        template: jinja source.
        messages: `{"role": ..., "content": ...}` each.
        generate: whether the text ends where the assistant is to speak.
        name: of the model, for error messages.

    Raises:
        HymaError: if the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generate
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise HymaError(
            f"The chat template of {name} refuses a conversation of {roles}, where its own system prompt comes first "
            f"if you set one: {error}."
        ) from error
    return str(text)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a beginning-of-sequence token in front of a text."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    with_specials, without = (list(tokenizer.encode("a", add_special_tokens=flag)) for flag in (True, False))
    return with_specials[:1] == [bos] and without[:1] != [bos]
