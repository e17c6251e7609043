"""Chat templates: where system prompts and control tokens stand, and which templates are refused."""

import pytest
from tiny_prompts import CHATML, EVERY, GEMMA, KINDS, PROMPTERS, TEMPLATES, TURNS, prompter_of, tokenizer_of

from hyma_mllm.data.prompts import IMAGE_TOKEN, Prompter
from hyma_mllm.errors import HymaError


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("adds", [True, False])
def test_bos_stands_first_exactly_once(template: str, adds: bool) -> None:
    tokenizer = tokenizer_of("piece", TEMPLATES[template], bos=adds)
    prompter = Prompter(tokenizer, "tiny", 500, 9)
    own = template in ("llama2", "llama3", "gemma")
    bos = [token == tokenizer.bos_token_id for token in prompter.before + prompter.prompt("What?")]
    assert sum(bos) == int(adds or own)
    assert bos[0] == (adds or own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "gemma"])
def test_the_system_prompt_stands_in_front_of_the_picture(kind: str, template: str) -> None:
    system = """Say "it's" {{ x }} %} — 🎈."""
    prompter = prompter_of(kind, TEMPLATES[template], system=system)
    tokenizer = tokenizer_of(kind)
    assert system in tokenizer.decode(list(prompter.before))
    assert system not in tokenizer.decode(list(PROMPTERS[kind, template].before))
    assert prompter.prompt("What?") == PROMPTERS[kind, template].prompt("What?")


@EVERY
def test_the_exported_template_reads_contents_in_parts(kind: str, template: str) -> None:
    prompter, tokenizer = PROMPTERS[kind, template], tokenizer_of(kind)
    plain = [{"role": "user", "content": f"{IMAGE_TOKEN}\nWhat?"}, {"role": "assistant", "content": "red"}]
    parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    rendered = [
        tokenizer.apply_chat_template(messages, chat_template=prompter.chat_template, tokenize=False)
        for messages in (plain, parts)
    ]
    assert rendered[0] == rendered[1]
    assert rendered[0].count(IMAGE_TOKEN) == 1


def test_templates_of_the_day_and_of_thought_are_fixed() -> None:
    day = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    today = day + "{{ 'Today: ' + date_string + '\n' }}"
    think = "{% if add_generation_prompt and enable_thinking is not defined %}{{ '<think>' }}{% endif %}"
    prompter = prompter_of("byte", today + CHATML + think)
    assert "Today: 26 Jul 2024" in tokenizer_of("byte").decode(list(prompter.before))
    assert "<think>" not in tokenizer_of("byte").decode(list(prompter.prompt("What?")))


CONTENT = "message['content']"
UPPER = "(message['content'] | upper if message['role'] == 'assistant' else message['content'])"
WELL = "('Well: ' if message['role'] == 'assistant' else '') + message['content']"
BAD_TEMPLATES = {
    "drops the question": CHATML.replace(CONTENT, "'<image>'"),
    "reorders or rewrites turns": CHATML.replace("in messages %}", "in messages | reverse %}"),
    "writes the picture 2 times": CHATML.replace(CONTENT, f"{CONTENT} + {CONTENT}"),
    "writes the picture 0 times": CHATML.replace(CONTENT, f"{CONTENT} | replace('<image>', '')"),
    "no end token behind an answer": CHATML.replace("+ '<|im_end|>' + '\n'", "+ '###\n'"),
    "drops or changes the answer": CHATML.replace(CONTENT, UPPER),
    "puts 'Well:' in front of the answer": CHATML.replace(CONTENT, WELL),
    "refuses a conversation of user": CHATML + "{{ raise_exception('no') }}",
}


@pytest.mark.parametrize("fault", BAD_TEMPLATES)
def test_a_template_that_does_not_align_is_refused(fault: str) -> None:
    with pytest.raises(HymaError, match="chat template of tiny") as caught:
        prompter_of("byte", BAD_TEMPLATES[fault])
    assert fault in str(caught.value)
    assert str(caught.value).count(". ") == 0, "one sentence"


@pytest.mark.parametrize("template", [GEMMA, CHATML.replace("for message in messages", "for message in messages[-2:]")])
def test_a_system_prompt_that_the_template_does_not_take_is_refused(template: str) -> None:
    with pytest.raises(HymaError, match=r"chat template of tiny (refuses .*System role|drops the system prompt)"):
        prompter_of("byte", template.replace("[-2:]", " if message['role'] != 'system'"), system="Be brief.")


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row() -> None:
    template = CHATML.replace(
        "message['content'] +", "(message['content'] if loop.index0 > messages | length - 3 else 'x') +"
    )
    prompter = prompter_of("byte", template)
    prompter.encode("fine", TURNS[:1])
    with pytest.raises(HymaError, match=r"tiny reorders or rewrites turn 1 of row bad/7"):
        prompter.encode("bad/7", TURNS[:2])


def test_several_templates_need_a_default() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.chat_template = {"tools": CHATML, "rag": CHATML}
    with pytest.raises(HymaError, match="chat templates rag, tools and no default"):
        Prompter(tokenizer, "tiny", 500, 9)
    tokenizer.chat_template = {"tools": "", "default": CHATML}
    assert Prompter(tokenizer, "tiny", 500, 9).before == PROMPTERS["byte", "chatml"].before


def test_a_base_model_needs_an_end_token() -> None:
    tokenizer = tokenizer_of("byte")
    tokenizer.eos_token = None
    with pytest.raises(HymaError, match="neither a chat template nor an end token"):
        Prompter(tokenizer, "tiny", 500, 9)
