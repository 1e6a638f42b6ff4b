"""Chat templates: the text transformers gives, and clear errors for everything else."""

import pytest
from transformers import PreTrainedTokenizerFast

from jaxserve.errors import ChatTemplateError, TokenizerError
from jaxserve.tokenizer import chat_template as chat_template_module
from jaxserve.tokenizer.chat_template import ChatTemplate

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}"""

TRIMMING = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<|start|>' + message.role + '<|end|>\n\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|end|>\n\n' }}{%- endif %}"""

TOOLS = """{% if tools %}<tools>
{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% endfor %}</tools>
{% endif %}{% for d in documents or [] %}[{{ loop.index }}] {{ d.title }}: {{ d.text }}
{% endfor %}{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message.role == 'user' %}
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{{ message.role }}{{ ' (last)' if loop.index0 == ns.last }}: {% if message.tool_calls %}
{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{% else %}{{ message.content }}{% endif %}
{% endfor %}{{ eos_token }}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""

GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}{% set name = 'bot' %}
{% generation %}{{ name }}: {{ m.content }}{% endgeneration %}
{% else %}{{ m.role }}: {{ m.content }}{% endif %}{{ m.reasoning_content }}
{% endfor %}"""

PARTS = """{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}<{{ part.type }}>{{ part.text }}{% endfor %}{% endif %}
{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "trimming": TRIMMING, "tools": TOOLS, "generation": GENERATION, "parts": PARTS}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "You are <b>kind</b> & 'quick'. "},
        {"role": "user", "content": "  Hällo 😀 {{ 7 * 7 }}\n"},
        {"role": "assistant", "content": "Yes ", "reasoning_content": "hm"},
        {"role": "user", "content": "And?"},
    ],
    [
        {"role": "user", "content": "Weather in Bern?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}],
        },
        {"role": "tool", "content": '{"t": 3}'},
    ],
]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "'<é>", "parameters": {"type": "object"}},
}


@pytest.fixture(scope="module")
def oracle(byte_level):
    def render(template, messages, **options):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend, **SPECIAL)
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    return render


def chat(template, messages, **options):
    return ChatTemplate(template, special_tokens=SPECIAL).render(messages, **options)


@pytest.mark.parametrize("messages", CHATS, ids=["short", "long", "tool call"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_prompt_is_the_one_transformers_gives(name, messages, prompt, oracle):
    ours = chat(TEMPLATES[name], messages, add_generation_prompt=prompt)

    assert ours == oracle(TEMPLATES[name], messages, add_generation_prompt=prompt)


def test_tools_documents_and_extra_variables_reach_the_template(oracle):
    documents = [{"title": "T", "text": "words"}]
    ours = chat(TOOLS, CHATS[0], tools=[TOOL], documents=documents, extra={"enable_thinking": False})

    assert "<think></think>" in ours
    assert ours == oracle(
        TOOLS, CHATS[0], tools=[TOOL], documents=documents, add_generation_prompt=True, enable_thinking=False
    )


@pytest.mark.parametrize("name", ["chatml", "trimming", "parts"])
@pytest.mark.parametrize("content", ["Sure, ", "Sure", "Sure,\n\n", "a b  "])
def test_a_final_message_can_be_continued(name, content, oracle):
    messages = [*CHATS[0], {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}

    assert chat(TEMPLATES[name], messages, **options) == oracle(TEMPLATES[name], messages, **options)


def test_smollm2_renders_as_transformers_does(smollm2, oracle):
    template = ChatTemplate.of_tokenizer(smollm2)

    assert template.render(CHATS[1]) == oracle(smollm2.chat_template, CHATS[1], add_generation_prompt=True)


def test_text_parts_are_joined_for_a_template_that_wants_a_string():
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    assert "one\ntwo" in chat(CHATML, [{"role": "user", "content": content}])


def test_parts_stay_parts_for_a_template_that_loops_over_them():
    content = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

    assert "<text>one<text>two" in chat(PARTS, [{"role": "user", "content": content}])


def test_a_string_becomes_a_part_for_a_template_that_only_loops():
    template = "{% for m in messages %}{% for part in m['content'] %}{{ part.text }};{% endfor %}{% endfor %}"

    assert chat(template, CHATS[0]) == "Hi;"


def test_an_image_is_refused_by_a_text_model():
    with pytest.raises(ChatTemplateError, match="image_url"):
        chat(CHATML, [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_the_templates_own_message_reaches_the_client():
    with pytest.raises(ChatTemplateError, match="unknown role robot") as caught:
        chat(TRIMMING, [{"role": "robot", "content": "x"}])

    assert caught.value.status == 400
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0].content + 1 }}", "{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ messages.x.y }}"],
)
def test_a_template_that_trips_over_the_messages_is_a_bad_request(template):
    with pytest.raises(ChatTemplateError) as caught:
        chat(template, CHATS[0])

    assert "\n" not in str(caught.value)
    assert "/" not in str(caught.value).replace("'", "")  # no paths


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
    ],
)
def test_the_sandbox_holds(template):
    with pytest.raises(ChatTemplateError):
        chat(template, CHATS[0])


def test_rendering_does_not_change_the_callers_messages():
    messages = [{"role": "user", "content": "x", "parts": [1]}]

    chat("{% for m in messages %}{% set _ = m.parts %}{% endfor %}", messages, add_generation_prompt=True)

    assert messages == [{"role": "user", "content": "x", "parts": [1]}]


@pytest.mark.parametrize("name", ["messages", "bos_token", "add_generation_prompt", "raise_exception"])
def test_extra_variables_cannot_replace_reserved_ones(name):
    with pytest.raises(ChatTemplateError, match=name):
        chat(CHATML, CHATS[0], extra={name: "x"})


def test_the_prompt_cannot_grow_without_bound(monkeypatch):
    monkeypatch.setattr(chat_template_module, "_MAX_PROMPT_CHARS", 1000)

    with pytest.raises(ChatTemplateError, match="1000"):
        chat("{% for i in range(2000) %}x{{ i }}{% endfor %}", CHATS[0])


def test_continuing_needs_text_and_no_generation_prompt():
    with pytest.raises(ChatTemplateError, match="exclude"):
        chat(CHATML, CHATS[0], continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="needs text"):
        chat(CHATML, [{"role": "user", "content": None}], continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(ChatTemplateError, match="as it is"):
        chat("fixed", CHATS[0], continue_final_message=True, add_generation_prompt=False)


def test_values_nested_beyond_reason_are_a_bad_request():
    nested = {}
    for _ in range(100_000):
        nested = {"properties": nested}

    with pytest.raises(ChatTemplateError, match="nested too deeply"):
        chat(TOOLS, CHATS[0], tools=[nested])


def test_no_messages_are_refused():
    with pytest.raises(ChatTemplateError, match="no messages"):
        chat(CHATML, [])


def test_a_broken_template_is_found_when_it_is_loaded():
    with pytest.raises(TokenizerError, match="line 2"):
        ChatTemplate("\n{% if %}")


def test_named_templates_choose_tool_use_for_tools():
    template = ChatTemplate({"default": "plain", "tool_use": "with tools"})

    assert template.render(CHATS[0]) == "plain"
    assert template.render(CHATS[0], tools=[TOOL]) == "with tools"
    with pytest.raises(TokenizerError, match="no default"):
        ChatTemplate({"rag": "x"})


def test_a_template_file_replaces_the_models(tmp_path, smollm2, byte_level):
    path = tmp_path / "own.jinja"
    path.write_text("own {{ eos_token }}")

    assert ChatTemplate.of_tokenizer(smollm2, path=path).render(CHATS[0]) == "own <|im_end|>"
    assert ChatTemplate.of_tokenizer(byte_level) is None
    with pytest.raises(TokenizerError, match="absent"):
        ChatTemplate.of_tokenizer(smollm2, path=tmp_path / "absent.jinja")
