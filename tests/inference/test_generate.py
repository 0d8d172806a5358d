"""Prompts files, requests, what is written about a completion."""

import json
from pathlib import Path

import pytest

from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError, RequestError
from ouro_megatron.inference.exit_policy import ExitPolicy, ExitTracker
from ouro_megatron.inference.generate import Completion, read_prompts, save_sample
from ouro_megatron.inference.request import Finished, GeneratedToken, Request
from tests.tiny import write_tokenizer


@pytest.mark.parametrize("text", ["q=0.8", "step=3", "change=0.1", "expected", "all"])
def test_policies_round_trip(text: str) -> None:
    assert str(ExitPolicy.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["q=1.5", "q=-0.1", "q=nan", "q=x", "step=0", "step=1.5", "change=0", "change=inf", "last one", ""]
)
def test_bad_policies(text: str) -> None:
    with pytest.raises(RequestError, match=r"exit policy .* write q=0.8"):
        ExitPolicy.parse(text)


def test_exit_probabilities_add_up_and_shut_gates_leave_at_the_end() -> None:
    tracker = ExitTracker(3)
    for gate in (0.0, 0.0, 5.0):
        tracker.add(gate)
    assert tracker.probabilities == pytest.approx([0.5, 0.25, 0.25])
    shut = ExitTracker(2)
    assert shut.add(-2000.0) == 0.0
    assert shut.add(-2000.0) == 1.0
    assert ExitTracker(2).add(2000.0) == 1.0


def test_prompts_files(tmp_path: Path) -> None:
    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    plain.write_text("one\n\ntwo\n")
    assert [line.prompt for line in read_prompts(plain)] == ["one", "two"]
    lines.write_text('{"prompt": "a", "exit": "step=2", "seed": 4}\n')
    assert read_prompts(lines)[0].seed == 4
    for content, message in (
        ('{"prompt": "a"}\n{"prompt": 3}', r"jsonl:2: prompt"),
        ('{"prompt": "a", "tempratur": 1}', r"jsonl:1: tempratur"),
        ("{", r"jsonl:1: Invalid JSON"),
        ("\n", "holds no prompt"),
    ):
        lines.write_text(content)
        with pytest.raises(DataError, match=message):
            read_prompts(lines)


def test_samples_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "s p" / "samples.json"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    request = Request(tuple(tokenizer.encode("ab")), exit_policy=ExitPolicy(q=0.5))
    completion = Completion(0, "ab", request, [GeneratedToken(2, "b", 3, (0.1, 0.2, 0.7))], Finished("length"))
    for _ in range(2):
        save_sample(path, completion, Path("ckpt"), tokenizer)
    saved = json.loads(path.read_text())
    assert len(saved) == 2
    assert saved[0]["exit"] == "q=0.5"
    assert [token["text"] for token in saved[0]["tokens"]] == ["a", "b", "b"]
    assert saved[0]["tokens"][2] == {"text": "b", "depth": 3, "prompt": False}
    path.write_text("{}")
    with pytest.raises(DataError, match="not a list"):
        save_sample(path, completion, Path("ckpt"), tokenizer)
