"""Choosing tokens, parsing exit policies, saving samples."""

import json
from pathlib import Path

import pytest
import torch

from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.inference.exit_policy import ExitPolicy
from ouro_megatron.inference.generate import GeneratedToken, GenerationSettings, _TextPieces, choose, save_sample
from tests.tiny import write_tokenizer

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])


def draws(**settings: object) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    made = GenerationSettings(**settings)  # type: ignore[arg-type]
    return {choose(LOGITS, made, generator) for _ in range(300)}


def test_greedy_top_k_top_p() -> None:
    assert draws() == {1}
    assert draws(temperature=5.0) == {0, 1, 2, 3, 4}
    assert draws(temperature=5.0, top_k=2) == {1, 2}
    # softmax of the logits: 0.03 0.64 0.23 0.09 0.01
    assert draws(temperature=1.0, top_p=0.5) == {1}
    assert draws(temperature=1.0, top_p=0.7) == {1, 2}


def test_seed_repeats() -> None:
    settings = GenerationSettings(temperature=2.0)
    first, second = (
        [choose(LOGITS, settings, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(4), torch.Generator().manual_seed(4))
    )
    assert first == second


@pytest.mark.parametrize("text", ["q=0.8", "step=3", "all"])
def test_policies_round_trip(text: str) -> None:
    assert str(ExitPolicy.parse(text)) == text


@pytest.mark.parametrize("text", ["q=1.5", "q=x", "step=0", "step=1.5", "last one", ""])
def test_bad_policies(text: str) -> None:
    with pytest.raises(RecipeError, match=r"--exit"):
        ExitPolicy.parse(text)


def test_pieces_of_a_character_appear_together(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    pieces = _TextPieces(tokenizer)
    assert "".join(pieces.add(token) for token in tokenizer.encode("a b")) == "a b"


def test_samples_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "s p" / "samples.json"
    tokens = [GeneratedToken(1, "a", 0), GeneratedToken(2, "b", 3, (0.1, 0.2, 0.7))]
    for _ in range(2):
        save_sample(path, "a", Path("ckpt"), ExitPolicy(q=0.5), tokens)
    saved = json.loads(path.read_text())
    assert len(saved) == 2
    assert saved[0]["exit"] == "q=0.5"
    assert saved[0]["tokens"][1] == {"text": "b", "depth": 3, "prompt": False}
    path.write_text("{}")
    with pytest.raises(DataError, match="not a list"):
        save_sample(path, "a", Path("ckpt"), ExitPolicy(), tokens)
