"""Conversations out of the layouts that chat sets come in."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.fixtures import make_fixture
from data_prep.fixtures.writers import write_parquet
from data_prep.sources.chat_rows import messages_of
from ouro_megatron.errors import DataError
from tests.data_prep.sources.reading import read_all, source_of

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, ANSWER]},
        {"messages": json.dumps([ASK, ANSWER])},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"role": "User", "content": "q"}, {"role": "model", "content": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "response": "a"},
        {"question": "q", "answer": "a"},
        {"input": [ASK], "output": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
    ],
)
def test_layouts(row: dict[str, Any]) -> None:
    assert messages_of(row) == [ASK, ANSWER]


def test_instruction_with_input_and_system() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system_prompt": "Be short."}
    assert [turn["content"] for turn in messages_of(row)] == ["Be short.", "Add.\n\n1 2", "3"]
    assert messages_of({"messages": [{"role": "system", "content": "s"}, ASK, ANSWER], "system": "other"})[0] == {
        "role": "system",
        "content": "s",
    }


def test_reasoning_is_kept() -> None:
    thought = "<think>\nwhy\n</think>\n\na"
    assert messages_of({"messages": [ASK, {**ANSWER, "reasoning_content": "why"}]})[1]["content"] == thought
    assert messages_of({"prompt": "q", "response": "a", "reasoning": "why"})[1]["content"] == thought
    assert messages_of({"prompt": "q", "response": thought, "reasoning": "again"})[1]["content"] == thought


def test_tool_calls_are_kept() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}, ANSWER]
    found = messages_of({"messages": turns})
    assert '"name": "add", "arguments": {"a": 1}' in found[1]["content"] and found[2]["role"] == "tool"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "empty"),
        ({"messages": [ASK]}, "assistant says nothing"),
        ({"messages": [ANSWER]}, "without a user"),
        ({"messages": [ASK, {"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "image, which is not text"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "no content"),
        ({"messages": "[broken"}, "no JSON list"),
        ({"messages": ["q", "a"]}, "a turn is a str"),
        ({"prompt": "q", "response": None}, "null"),
        ({"prompt": " ", "response": "a"}, "'prompt'"),
        ({"text": "x"}, "nor a question"),
        ({"messages": [ASK, {"role": "assistant", "content": "\ud800"}]}, "surrogate"),
    ],
)
def test_what_is_no_conversation(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        messages_of(row)


def test_bad_rows_are_faults_and_answers_share_a_key(tmp_path: Path) -> None:
    rows = [{"messages": [ASK, ANSWER]}, {"messages": []}, {"messages": [ASK, {**ANSWER, "content": "b"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, faults = read_all({"kind": "chat", "path": str(tmp_path)})
    assert [document.key for document in documents] == ["q", "q"] and documents[0].text == ""
    assert len(faults) == 1 and faults[0].where.startswith("line 2")


def test_columns_that_hold_no_conversation(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"ask": "q", "reply": "a"}])
    with pytest.raises(DataError, match="ask, reply: no conversation"):
        source_of({"kind": "chat", "path": str(tmp_path)}).units(1)
    named = {"kind": "chat", "path": str(tmp_path), "question": "ask", "answer": "reply"}
    assert read_all(named)[0][0].messages == [ASK, ANSWER]
    with pytest.raises(DataError, match="give both"):
        source_of({"kind": "chat", "path": str(tmp_path), "question": "ask"}).units(1)


def test_llama_nemotron_reasoning_and_subsets(tmp_path: Path) -> None:
    settings = dict(make_fixture("llama_nemotron", tmp_path).settings)
    assert len(read_all({**settings, "subsets": ["math"]})[0]) == 6
    assert not read_all({**settings, "reasoning": "off"})[0]
    with pytest.raises(DataError, match=r"no \.jsonl of safety"):
        source_of({**settings, "subsets": ["safety"]}).units(1)


def test_nemotron_sft_general_keeps_a_system_text(tmp_path: Path) -> None:
    text = "Be brief.\n<extra_id_1>User\nq <extra_id_1>User\n<extra_id_1>Assistant\na\n"
    write_parquet(tmp_path / "a.parquet", [{"text": text}])
    (document,), _ = read_all({"kind": "nemotron_sft_general", "path": str(tmp_path)})
    assert [(turn["role"], turn["content"]) for turn in document.messages or ()] == [
        ("system", "Be brief."),
        ("user", "q <extra_id_1>User"),
        ("assistant", "a"),
    ]
    (plain,), _ = read_all({"kind": "nemotron_sft_general", "path": str(tmp_path), "roles": False})
    assert plain.text == text and plain.messages is None


def test_nemotron_sft_code_roles(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "Sort.\n\n<think>\nhow\n</think>\nsorted(x)"}, {"text": "no mark"}])
    first, second = read_all({"kind": "nemotron_sft_code", "path": str(tmp_path), "roles": True})[0]
    assert first.messages is not None and first.messages[1]["content"].startswith("<think>\nhow")
    assert second.messages is None and second.text == "no mark"


def test_placeholder_questions_are_faults(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"input": "-", "output": "a"}, {"input": "q", "output": "a"}])
    documents, faults = read_all({"kind": "opencodereasoning", "path": str(tmp_path)})
    assert len(documents) == 1 and "placeholder" in faults[0].reason
