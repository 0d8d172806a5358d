"""The analyses: separation of two prompt sets, answers by depth, judges; bad input gets one clear error."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import DataError, OuroError, RecipeError
from ouro_megatron.evaluation.agreement import agreement_matrix, analyse_agreement
from ouro_megatron.evaluation.judges import Item, judge_all, refusal_judge
from ouro_megatron.evaluation.prompts import read_items
from ouro_megatron.evaluation.safety import analyse_safety
from ouro_megatron.evaluation.separation import analyse_separation, separate, silhouette
from tests.checkpoint.huggingface.published import reference, write_published
from tests.distributed.ranks import RankFailure, run_ranks
from tests.reference.looplm import reference_generate

OURO = Path(sys.executable).with_name("ouro")
PROMPTS = ["the first prompt", "another", "and one more"]
JUDGE = "import sys, json\nfor line in sys.stdin:\n    print(json.dumps({'score': len(json.loads(line)['answer'])}))\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_published(tmp_path_factory.mktemp("analyses") / "published", dict(reference().state_dict()))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return tmp_path / "prompts.txt"


def test_separation_scores_against_scikit_learn() -> None:
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    random = np.random.default_rng(3)
    apart = random.normal(size=(12, 8)) + 4.0, random.normal(size=(9, 8))
    mixed = random.normal(size=(12, 8)), random.normal(size=(9, 8))
    labels = np.repeat((0, 1), (12, 9))
    for first, second in (apart, mixed):
        found = separate(1, first, second)
        plane = np.array([*found.first, *found.second])
        theirs = PCA(2).fit(np.concatenate((first, second)))
        assert found.explained == pytest.approx(theirs.explained_variance_ratio_)
        projected = theirs.transform(np.concatenate((first, second)))
        assert np.abs(plane) == pytest.approx(np.abs(projected), abs=1e-9)
        assert found.silhouette == pytest.approx(silhouette_score(projected, labels))
        assert silhouette(np.concatenate((first, second)), labels) == pytest.approx(
            silhouette_score(np.concatenate((first, second)), labels)
        )
    assert separate(1, *apart).accuracy == 1.0 and separate(1, *apart).silhouette > 0.5
    assert separate(1, *mixed).accuracy < 0.9 and separate(1, *mixed).silhouette < 0.2


def test_separation_of_two_sets(folder: Path, prompts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"12 + {n}"}) + "\n" for n in range(4)))
    found = run_ranks(separation, 1, folder, prompts, other, tmp_path / "out")[0]
    assert found == [1, 2, 3, 4, 5]
    saved = json.loads((tmp_path / "out" / "pca.json").read_text())
    assert [(len(row["first"]), len(row["second"])) for row in saved["loops"]] == [(3, 4)] * 5
    assert (tmp_path / "out" / "pca.png").read_bytes()[:4] == b"\x89PNG"
    single = tmp_path / "one.txt"
    single.write_text("one\n")
    with pytest.raises(DataError, match="at least two prompts"):
        analyse_separation(folder, prompts, single, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def separation(path: Path, first: Path, second: Path, out: Path) -> list[int]:
    return [row.loop for row in analyse_separation(path, first, second, out, loops=5, pool="mean")]


def agreement(path: Path, prompts: Path, out: Path, max_tokens: int) -> tuple[list[list[str]], list[list[float]]]:
    found = analyse_agreement(path, prompts, out, loops=5, max_tokens=max_tokens)
    return found.answers, found.matrix


def test_agreement_between_loops(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = [{"prompt": text} for text in PROMPTS] + [{"prompt": "yes or no:", "choices": ["yes", "no", "yes"]}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    answers, matrix = run_ranks(agreement, 1, folder, file, tmp_path / "out", 6)[0]
    tokenizer = load_tokenizer(folder)
    for loop in range(1, 6):
        for index, text in enumerate(PROMPTS):
            made, _ = reference_generate(reference(), tokenizer.encode(text), 6, loop)
            made = made[: made.index(0)] if 0 in made else made
            assert answers[loop - 1][index] == tokenizer.decode(made).strip()
        assert answers[loop - 1][3] in {"yes", "no"}
    assert matrix == agreement_matrix(answers)
    assert all(matrix[i][i] == 1.0 for i in range(5)) and matrix[0][4] == matrix[4][0]
    saved = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert [item["answers"][1] for item in saved["items"]] == answers[1]
    with pytest.raises(RankFailure, match=r"prompt 1 needs .* positions with its answer"):
        run_ranks(agreement, 1, folder, file, tmp_path / "out2", 5000)
    assert not (tmp_path / "out2").exists()


def safety(path: Path, prompts: Path, out: Path, judge: str) -> list[tuple[float, float]]:
    found = analyse_safety(path, prompts, out, judge=judge, loops=3, harmful_at=4.0, max_tokens=6)
    return [(row.mean_score, row.harmful) for row in found]


def test_safety_by_loop_with_a_judge_of_ones_own(folder: Path, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    out = tmp_path / "out"
    found = run_ranks(
        safety, 1, folder, prompts, out, f"command: {shlex.quote(sys.executable)} {tmp_path / 'judge.py'}"
    )[0]
    saved = json.loads((out / "safety.json").read_text())
    assert len(saved["items"]) == 9
    for loop, (mean, harmful) in enumerate(found, start=1):
        lengths = [len(item["answer"]) for item in saved["items"] if item["loop"] == loop]
        assert mean == pytest.approx(np.mean(lengths))
        assert harmful == pytest.approx(np.mean([length >= 4 for length in lengths]))
    # Another judge: the kept answers are judged, even changed ones, and nothing is generated again.
    kept = json.loads((out / "answers.json").read_text())
    kept["answers"]["2"] = ["I'm sorry, no.", "", "sure: do this"]
    (out / "answers.json").write_text(json.dumps(kept))
    again = run_ranks(safety, 1, folder, prompts, out, "refusals")[0]
    assert again[1] == pytest.approx(((1 + 1 + 5) / 3, 1 / 3))


def test_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal_judge("x", "I cannot help with that") == 1.0 and refusal_judge("x", "First, take") == 5.0
    items = [Item("p", "a", 1), Item("p", "b", 2)]
    (tmp_path / "my_judges.py").write_text(
        "def good(prompt, answer):\n    return 2\ndef bad(prompt, answer):\n    return 'high'\nvalue = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert judge_all("my_judges:good", items) == [2.0, 2.0]
    cases: list[tuple[str, type[OuroError], str]] = [
        ("my_judges:bad", DataError, "failed on answer 1"),
        ("my_judges:value", RecipeError, "not a function"),
        ("my_judges:nothing", RecipeError, "Write refusals"),
        ("nonsense", RecipeError, "Write refusals"),
        ("command: /no/such/program", DataError, "cannot be started"),
        ("command: false", DataError, "exit code 1"),
        ("command: echo '{\"score\": 1}'", DataError, "gave 1 lines for 2 answers"),
        ("command: printf 'x\\ny\\n'", DataError, "line 1"),
    ]
    for name, kind, message in cases:
        with pytest.raises(kind, match=message):
            judge_all(name, items)


def test_prompt_files(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for line, message in (
        ("{", ":1: write an object"),
        ('{"text": "x"}', ":1: write an object"),
        ('{"prompt": 3}', "prompt is not a text"),
        ('{"prompt": "x", "choices": ["one"]}', "list of two"),
        ("", "holds no prompt"),
    ):
        file.write_text(line)
        with pytest.raises(DataError, match=message):
            read_items(file)


def test_the_commands_refuse_bad_input(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "never"
    words = ["analyse", "safety", folder, prompts, "--out", out, "--template", "no place for it"]
    result = subprocess.run([str(OURO), *map(str, words)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "{prompt}" in result.stderr and "Traceback" not in result.stderr
    assert not out.exists()
