"""What is made of the scores, against plain loops over tokens; what tokens are."""

import math
from pathlib import Path

import numpy as np
import pytest

from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.evaluation.depth import (
    HELPED,
    calibration,
    depth_by_class,
    exit_curve,
    exit_loops,
    loop_quality,
)
from ouro_megatron.evaluation.held_out_texts import TOKEN_CLASSES, token_bytes, token_classes
from ouro_megatron.evaluation.scores import TokenScores

LOOPS, TOKENS = 4, 300


@pytest.fixture(scope="module")
def scores() -> TokenScores:
    random = np.random.default_rng(0)
    ce = random.gamma(2.0, 1.0, (LOOPS, TOKENS)).astype(np.float32)
    correct = random.random((LOOPS, TOKENS)) < 0.4
    gate = random.normal(0.0, 2.0, (LOOPS, TOKENS)).astype(np.float32)
    return TokenScores(ce, correct, gate, random.integers(0, 50, TOKENS))


def exits_of(scores: TokenScores, token: int) -> list[float]:
    survival, p = 1.0, []
    for loop in range(LOOPS - 1):
        stop = 1 / (1 + math.exp(-float(scores.gate_tn[loop, token])))
        p.append(stop * survival)
        survival *= 1 - stop
    return [*p, survival]


def test_quality_of_each_loop(scores: TokenScores) -> None:
    rows = loop_quality(scores, text_bytes=900, trained=LOOPS)
    for loop, row in enumerate(rows):
        loss = sum(float(x) for x in scores.ce_tn[loop]) / TOKENS
        assert row.loss == pytest.approx(loss) and row.perplexity == pytest.approx(math.exp(loss))
        assert row.bits_per_byte == pytest.approx(loss * TOKENS / math.log(2) / 900)
        assert row.accuracy == pytest.approx(sum(scores.correct_tn[loop]) / TOKENS)
        mean = sum(exits_of(scores, token)[loop] for token in range(TOKENS)) / TOKENS
        assert row.exit_probability == pytest.approx(mean)
    deeper = loop_quality(scores, 900, trained=2)
    assert [row.exit_probability for row in deeper[2:]] == [0.0, 0.0]
    assert sum(row.exit_probability for row in deeper) == pytest.approx(1.0)


def test_curve_over_q(scores: TokenScores) -> None:
    for point in exit_curve(scores, (0.0, 0.3, 0.77, 1.0)):
        loops, losses, right = [], [], []
        for token in range(TOKENS):
            p, exit_loop = exits_of(scores, token), LOOPS - 1
            if point.q < 1:
                exit_loop = next(loop for loop in range(LOOPS) if sum(p[: loop + 1]) >= point.q or loop == LOOPS - 1)
            loops.append(exit_loop + 1)
            losses.append(float(scores.ce_tn[exit_loop, token]))
            right.append(bool(scores.correct_tn[exit_loop, token]))
        assert point.mean_loops == pytest.approx(np.mean(loops))
        assert point.loss == pytest.approx(np.mean(losses), rel=1e-6)
        assert point.accuracy == pytest.approx(np.mean(right))
    assert set(exit_loops(scores, 0.0)) == {0} and set(exit_loops(scores, 1.0)) == {LOOPS - 1}


def test_calibration(scores: TokenScores) -> None:
    from sklearn.metrics import roc_auc_score

    for loop, row in enumerate(calibration(scores, bins=7)):
        gain = scores.ce_tn[loop].astype(float) - scores.ce_tn[loop + 1]
        stop = scores.stop_probabilities()[loop]
        assert row.auc == pytest.approx(roc_auc_score(gain > HELPED, -stop))
        assert sum(part.tokens for part in row.bins) == TOKENS
        assert [part.stop for part in row.bins] == sorted(part.stop for part in row.bins)
        mean = sum(part.next_gain * part.tokens for part in row.bins) / TOKENS
        assert mean == pytest.approx(gain.mean(), rel=1e-5)


def test_a_perfect_gate_and_a_useless_one() -> None:
    """Loop 2 helps the first half of the tokens. A gate that knows has AUC 1, one that says the same always 0.5."""
    ce = np.ones((2, 100), np.float32)
    ce[1, :50] = 0.5
    knows = np.where(np.arange(100) < 50, -3.0, 3.0).astype(np.float32)
    for gate, auc in ((knows, 1.0), (np.zeros(100, np.float32), 0.5)):
        found = calibration(TokenScores(ce, ce > 0, np.stack((gate, gate)), np.zeros(100, np.int64)))
        assert found[0].auc == auc
    nothing = calibration(TokenScores(np.ones_like(ce), ce > 0, np.stack((knows, knows)), np.zeros(100, np.int64)))
    assert nothing[0].auc is None


def test_depth_by_class(scores: TokenScores) -> None:
    kinds = np.arange(TOKENS) % 3
    rows = depth_by_class(scores, kinds, ("a", "b", "c", "none"))
    assert [row.name for row in rows] == ["a", "b", "c"]
    chosen = [token for token in range(TOKENS) if token % 3 == 1]
    depth = np.mean([sum((t + 1) * p for t, p in enumerate(exits_of(scores, token))) for token in chosen])
    assert rows[1].expected_depth == pytest.approx(depth) and rows[1].tokens == len(chosen)


def test_bytes_and_kinds_of_tokens(tmp_path: Path) -> None:
    """Byte-level tokens count their bytes, also those of half a character."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<|endoftext|>": 0, **{letter: i for i, letter in enumerate(sorted(letters), start=1)}}
    words = ["Ġthe", "the", "12", "Ċ", "Ġ=", "é"]
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(w for w in words if w not in vocabulary)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path)
    text = "naïve — ünïcode 深度 12 = x\n"
    ids = np.array([*tokenizer.encode(text), tokenizer.eod])
    assert token_bytes(tokenizer, ids) == len(text.encode())
    by_name = {word: backend.token_to_id(word) for word in ("Ġthe", "the", "12", "Ċ", "Ġ=", "<|endoftext|>")}
    kinds = token_classes(tokenizer, np.array(list(by_name.values())))
    names = dict(zip(by_name, (TOKEN_CLASSES[kind] for kind in kinds), strict=True))
    assert names == {
        "Ġthe": "word start",
        "the": "word rest",
        "12": "number",
        "Ċ": "indent or newline",
        "Ġ=": "punctuation",
        "<|endoftext|>": "end of document",
    }
