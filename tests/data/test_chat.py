"""Chat templates. The expected texts were compared with what transformers 5.23.0 makes of the same template."""

import datetime
import json
from pathlib import Path

import pytest

from nemotron_jax.data.chat import ChatTemplate
from nemotron_jax.errors import DataError

SOURCE = Path(__file__).with_name("nemotron_chat.jinja").read_text()

SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATION = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "reasoning_content": "easy", "content": "4"},
    {"role": "user", "content": "Weather in Bern & <Rom>?"},
    {
        "role": "assistant",
        "content": "<think>\ncall it\n</think>\nLet me look.",
        "tool_calls": [
            {"function": {"name": "weather", "arguments": {"city": "Bern", "days": [1, 2]}}},
            {"function": {"name": "weather", "arguments": {"city": "Rom"}}},
        ],
    },
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "rain"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["<°C>"]}},
            "required": ["city"],
        },
    },
}
FIRST = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{}4<|im_end|>\n"
REST = """<|im_start|>user
Weather in Bern & <Rom>?<|im_end|>
<|im_start|>assistant
<think>
call it
</think>
Let me look.
<tool_call>
<function=weather>
<parameter=city>
Bern
</parameter>
<parameter=days>
[1, 2]
</parameter>
</function>
</tool_call>
<tool_call>
<function=weather>
<parameter=city>
Rom
</parameter>
</function>
</tool_call>
<|im_end|>
<|im_start|>user
<tool_response>
sun
</tool_response>
<tool_response>
rain
</tool_response>
<|im_end|>
"""
TOOLS = """# Tools

You have access to the following functions:

<tools>
<function>
<name>weather</name>
<description>Looks.</description>
<parameters>
<parameter>
<name>city</name>
<type>string</type>
</parameter>
<parameter>
<name>unit</name>
<type>string</type>
<enum>["<°C>"]</enum>
</parameter>
<required>["city"]</required>
</parameters>
</function>
</tools>"""
OPENING = "<|im_start|>assistant\n<think>\n"


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(SOURCE, "a.jinja")


def system(text: str) -> str:
    return f"<|im_start|>system\n{text}<|im_end|>\n"


def test_several_turns(template):
    """Reasoning of turns before the last message of the user is gone; that after it stays."""
    expected = FIRST.format("<think></think>") + REST + OPENING
    assert template.render(CONVERSATION) == system("") + expected
    assert template.render([SYSTEM, *CONVERSATION]) == system("Be brief.") + expected


def test_all_reasoning_and_no_generation_prompt(template):
    made = template.render([SYSTEM, *CONVERSATION], add_generation_prompt=False, truncate_history_thinking=False)
    assert made == system("Be brief.") + FIRST.format("<think>\neasy\n</think>\n") + REST


def test_tools_and_an_answer_without_thinking(template):
    made = template.render([SYSTEM, CONVERSATION[0]], tools=[TOOL], enable_thinking=False)
    question = "<|im_start|>user\n2+2?<|im_end|>\n"
    assert made == system(f"Be brief.\n\n{TOOLS}") + question + "<|im_start|>assistant\n<think></think>"
    assert template.render(CONVERSATION[:1], tools=[TOOL]) == system(TOOLS) + question + OPENING


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a.jinja: the chat template refuses the conversation: There is no message."),
        ([{"role": "bot", "content": "x"}], "A message has the role bot: expected"),
        ([{"role": "assistant", "content": 3}], "a.jinja: the chat template fails on the conversation"),
    ],
)
def test_conversations_that_are_refused(template, messages, message):
    with pytest.raises(DataError) as error:
        template.render(messages)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def render(source: str, **variables) -> str:
    return ChatTemplate(source, "a.jinja").render([], **variables)


def test_what_templates_count_on():
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"  # trim_blocks, lstrip_blocks
    assert render("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "02"  # fmt: skip # noqa: E501
    assert render("{% generation %}{{ 1 }}{% endgeneration %}2") == "12"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ ['é'] | tojson(ensure_ascii=true, indent=1) }}") == '[\n "\\u00e9"\n]'
    assert render("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)
    assert render("{{ tools is none and documents is none and add_generation_prompt }}") == "True"
    assert render("{{ missing }}") == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ '%c' % 'ab' }}",
    ],
)
def test_templates_cannot_reach_out_and_failures_are_messages(source):
    with pytest.raises(DataError, match=r"a\.jinja: the chat template fails on the conversation"):
        render(source)


def test_a_template_that_is_no_jinja():
    with pytest.raises(DataError, match=r"a\.jinja: the chat template is not valid Jinja, line 2: "):
        ChatTemplate("\n{% if %}", "a.jinja")


def test_where_templates_are_found(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "<|im_end|>", "pad_token": None}

    def loaded(**more) -> str:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
        return ChatTemplate.load(tmp_path).render([])

    assert loaded(chat_template="{{ bos_token }}{{ eos_token }}{{ pad_token }}") == "<s><|im_end|>"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert loaded(chat_template=named) == "b"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}é", encoding="utf-8")
    assert loaded(chat_template="a") == "<s>é"  # the file wins


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "tokenizer_config.json: expected JSON"),
        ("[]", "tokenizer_config.json: expected a JSON object, got list"),
        ('{"chat_template": 1}', "expected chat_template to be a text or a list of named ones, got int"),
        ('{"chat_template": [{"name": "a", "template": "b"}]}', "a chat template named 'default', got ['a']"),
    ],
)
def test_files_that_are_refused(tmp_path, config, message):
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DataError) as error:
        ChatTemplate.load(tmp_path)
    assert message in str(error.value)


def test_a_template_file_that_is_no_text(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"chat_template\.jinja cannot be read as text"):
        ChatTemplate.load(tmp_path)
