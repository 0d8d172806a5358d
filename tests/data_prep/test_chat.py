"""Conversations to ids: those of the whole rendered text, the assistant's turns counted, nothing forged by content."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.chat import ChatEncoder
from ouro_megatron.data.chat_template import CHATML
from ouro_megatron.errors import DataError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|eot|>", "<|head|>"]
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "<think>\n12 + 30 = 42\n</think>\n\nIt is 42."},
    {"role": "user", "content": "  Is that even?\n"},
    {"role": "assistant", "content": "Yes, 42 = 2 · 21 🙂"},
]

# Forms that are in use, written down small: what matters of each is how it treats turns.
INSTRUCT = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]
{%- elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}{% elif m['role'] == 'system' %}
{%- else %}{{ raise_exception('only user and assistant, please') }}{% endif %}{% endfor %}"""
HEADERS = """{% for m in messages -%}
{{ '<|head|>' + m.role + '<|head|>\n\n' + (m.content | trim) + '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|head|>\n\n' }}{% endif %}"""
PLAIN_WORDS = """{% for m in messages -%}
{{ {'user': 'USER', 'assistant': 'ASSISTANT', 'system': 'NOTE'}[m.role] }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"""
DROPS_OLD_THOUGHTS = """{% set ns = namespace(last=0) %}
{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}
{%- else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
OPENS_A_THOUGHT = """{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
DROPS_ALL_THOUGHTS = OPENS_A_THOUGHT.replace("m.content", "m.content.split('</think>')[-1]")
CALLS_TOOLS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "instruct": INSTRUCT,
    "headers": HEADERS,
    "plain words": PLAIN_WORDS,
    "drops old thoughts": DROPS_OLD_THOUGHTS,
    "opens a thought": OPENS_A_THOUGHT,
    "calls tools": CALLS_TOOLS,
}


def write_chat_tokenizer(folder: Path, template: Any = None, special: list[str] = SPECIAL) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Its offsets leave out the spaces around a word: they must not be trusted for the marks.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(), "\n\n\n It is. the assistant's turn\n\n" * 50], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("with space") / "tokenizer")


def counted(encoder: ChatEncoder, talk: list[dict[str, Any]]) -> list[str]:
    """The stretches of text that count in the loss."""
    ids, counts = encoder.encode(talk)
    assert len(ids) == len(counts)
    stretches: list[list[int]] = []
    for position, (token, counts_here) in enumerate(zip(ids, counts, strict=True)):
        if counts_here and (position == 0 or not counts[position - 1]):
            stretches.append([])
        if counts_here:
            stretches[-1].append(token)
    return [encoder._tokenizer.decode(stretch, skip_special_tokens=False) for stretch in stretches]


ANSWERS = [turn["content"] for turn in TALK if turn["role"] == "assistant"]


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("chatml", [answer + "<|im_end|>" for answer in ANSWERS]),
        ("instruct", [" " + answer + "</s>" for answer in ANSWERS]),
        ("headers", [answer + "<|eot|>" for answer in ANSWERS]),
        ("drops old thoughts", ["It is 42.<|im_end|>", ANSWERS[1] + "<|im_end|>"]),
        # The opened thought is in the prompt that generation is fed, the rest is the assistant's.
        ("opens a thought", ["12 + 30 = 42\n</think>\n\nIt is 42.<|im_end|>", ANSWERS[1] + "<|im_end|>"]),
        ("plain words", [" " + answer + "\n" for answer in ANSWERS]),
    ],
)
def test_the_assistants_turns_count_with_their_end(folder: Path, form: str, expected: list[str]) -> None:
    found = counted(ChatEncoder(folder, TEMPLATES[form]), TALK)
    if form == "plain words":  # no special token ends a turn; "ASSISTANT: " may share a token with what follows
        assert [text.strip() for text in found] == [text.strip() for text in expected]
    else:
        assert found == expected


@pytest.mark.parametrize("form", TEMPLATES)
def test_ids_equal_transformers(folder: Path, form: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[form]
    )
    encoder = ChatEncoder(folder, TEMPLATES[form])
    expected = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=form == "chatml")
    ids, counts = encoder.encode(TALK)
    assert ids == expected["input_ids"]
    if form == "chatml":
        assert [int(count) for count in counts] == expected["assistant_masks"]
    prompt = theirs.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoder.prompt(TALK[:2]) == prompt


TEXTS = st.lists(st.sampled_from([*"ab 1\n<|>_im/s[]INT. é中🙂", *SPECIAL]), min_size=1, max_size=30).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    question=TEXTS, answer=TEXTS.filter(lambda text: bool(text.strip())), form=st.sampled_from(["chatml", "headers"])
)
def test_content_never_becomes_a_special_token(folder: Path, question: str, answer: str, form: str) -> None:
    encoder = ChatEncoder(folder, TEMPLATES[form])
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids, counts = encoder.encode(talk)
    harmless = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    specials = {encoder._tokenizer.token_to_id(token) for token in SPECIAL}
    template_only = [token for token in encoder.encode(harmless)[0] if token in specials]
    assert [token for token in ids if token in specials] == template_only
    text = encoder._tokenizer.decode(ids, skip_special_tokens=False)
    assert text == encoder.template.render(talk).replace("\ufdd0", "").replace("\ufdd1", "")
    end = "<|im_end|>" if form == "chatml" else "<|eot|>"
    wanted = answer if form == "chatml" else answer.strip()
    # The newlines before a turn may be one token with the turn's first; that token counts.
    assert "".join(counted(encoder, talk)).lstrip("\n") == (wanted + end).lstrip("\n")
    assert sum(counts) < len(ids)


def test_tool_calls_count_and_results_do_not(folder: Path) -> None:
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "get", "arguments": {"x": "é</s>"}}}],
        },
        {"role": "tool", "content": "<|im_end|>rain"},
        {"role": "assistant", "content": "It rains."},
    ]
    encoder = ChatEncoder(folder, CALLS_TOOLS)
    called, said = counted(encoder, talk)
    assert said == "It rains.<|im_end|>"
    assert called == '<tool_call>\n{"name": "get", "arguments": {"x": "é</s>"}}\n</tool_call><|im_end|>'
    with pytest.raises(DataError, match=r"turn 2 \(assistant\).*tool calls"):
        ChatEncoder(folder).encode(talk)


def test_text_parts_are_joined_and_reasoning_is_kept(folder: Path) -> None:
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "reasoning_content": "why"},
    ]
    assert counted(ChatEncoder(folder), talk) == ["<think>\nwhy\n</think>\n\nc<|im_end|>"]
    assert "ab" in ChatEncoder(folder)._tokenizer.decode(ChatEncoder(folder).encode(talk)[0])
    for template, answer in ((INSTRUCT, talk[1]), (DROPS_ALL_THOUGHTS, TALK[2])):
        with pytest.raises(DataError, match=r"turn 2 \(assistant\).*leaves its reasoning out"):
            ChatEncoder(folder, template).encode([talk[0], answer])


IMAGE = [{"type": "image", "url": "x"}]
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], "no turns"),
        ("hello", "a list of turns"),
        ([USER], "no turn of the assistant"),
        ([USER, "b"], "turn 2: must be a mapping"),
        ([{"content": "a"}], "turn 1: has no role"),
        ([USER, {"role": "gpt", "content": "a"}], "turn 2: unknown role 'gpt'"),
        ([USER, {"role": "assistant", "content": " "}], r"turn 2 \(assistant\): is empty"),
        ([USER, {"role": "assistant"}], r"turn 2 \(assistant\): is empty"),
        ([{"role": "user", "content": IMAGE}], r"turn 1 \(user\): part 1 of its content is 'image'"),
        ([{"role": "user", "content": 3}], r"turn 1 \(user\): its content is neither text"),
        ([USER, {"role": "assistant", "content": "a\ud800"}], r"turn 2 \(assistant\): holds half a surrogate"),
        ([USER, {"role": "assistant", "content": "\ufdd2"}], r"turn 2 \(assistant\).*U\+FDD2"),
    ],
)
def test_malformed_conversations_name_the_turn(folder: Path, talk: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ChatEncoder(folder).encode(talk)


def test_a_template_that_refuses_names_the_turn_and_its_reason(folder: Path) -> None:
    talk = [USER, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}]
    with pytest.raises(DataError, match=r"turn 3 \(tool\): .*only user and assistant, please"):
        ChatEncoder(folder, INSTRUCT).encode(talk)
    with pytest.raises(DataError, match=r"turn 1.*unsafe"):
        ChatEncoder(folder, "{{ messages.__class__.__mro__ }}").encode(TALK)
    with pytest.raises(DataError, match="line 1: not a Jinja chat template"):
        ChatEncoder(folder, "{% for %}")


def test_where_templates_come_from(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks the special tokens <\|im_start\|> and <\|im_end\|>"):
        ChatEncoder(write_chat_tokenizer(tmp_path / "bare", special=["</s>"]))
    named = [{"name": "default", "template": INSTRUCT}, {"name": "other", "template": HEADERS}]
    several = write_chat_tokenizer(tmp_path / "several", template=named)
    assert ChatEncoder(several).template.source == INSTRUCT
    assert ChatEncoder(several, "other").template.source == HEADERS
    assert ChatEncoder(several, "chatml").template.source == CHATML
    with pytest.raises(DataError, match="there are chatml, default, other"):
        ChatEncoder(several, "nope")
    (several / "chat_template.jinja").write_text(PLAIN_WORDS)
    assert ChatEncoder(several).template.source == PLAIN_WORDS
