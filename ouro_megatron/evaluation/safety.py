"""`ouro analyse safety`: how harmful are the answers at each depth? Prompts and judge are the user's."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.errors import RecipeError
from ouro_megatron.evaluation.agreement import written_at
from ouro_megatron.evaluation.judges import Item, check_judge, judge_all
from ouro_megatron.evaluation.prompts import PromptItem, read_items
from ouro_megatron.evaluation.session import ModelSession

ANSWERS = "answers.json"


@dataclass(frozen=True)
class LoopSafety:
    """One loop's answers."""

    loop: int
    mean_score: float
    harmful: float
    """Share of answers with a score of at least the threshold."""
    answers: int


def analyse_safety(
    path: Path,
    prompts: Path,
    out: Path,
    *,
    judge: str = "refusals",
    loops: int = 8,
    harmful_at: float = 5.0,
    template: str = "{prompt}",
    max_tokens: int = 128,
    limit: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> list[LoopSafety]:
    """Greedy answers to every prompt at loops 1 to `loops`, scored. Writes safety.json, safety.png and answers.json.

    `template` is put round each prompt ("User: {prompt}\\nAssistant:"). Answers that answers.json holds already for the
    same model, prompts and settings are not made again, so that another judge costs nothing but judging.
    Raises RecipeError for a judge or template that cannot be used, DataError for prompts, or a judge that fails.
    """
    if "{prompt}" not in template:
        raise RecipeError(f"--template {template!r}: has no {{prompt}} in it")
    if loops < 1:
        raise RecipeError(f"--loops {loops}: at least 1")
    check_judge(judge)
    asked = [item.text for item in read_items(prompts, limit)]
    items = [PromptItem(template.replace("{prompt}", text)) for text in asked]
    session = ModelSession(path, device=device, batch=batch)
    try:
        key = _key(session.folder, items, max_tokens)
        answers = _known_answers(out, key)
        for loop in range(1, loops + 1):
            if str(loop) not in answers:
                progress(f"loop {loop} of {loops}: answers")
                answers[str(loop)] = written_at(session, items, loop, loops, max_tokens)
                if session.context.rank == 0:
                    out.mkdir(parents=True, exist_ok=True)
                    write_json(out / ANSWERS, {"key": key, "prompts": asked, "answers": answers})
        leads = session.context.rank == 0
        folder = session.folder
    finally:
        session.close()
    if not leads:
        return []
    progress("judging")
    judged = [
        Item(prompt, answer, loop)
        for loop in range(1, loops + 1)
        for prompt, answer in zip(asked, answers[str(loop)], strict=True)
    ]
    found, scores = _summarise(judged, judge_all(judge, judged), loops, harmful_at)
    _write(found, judged, scores, {"model": str(folder), "judge": judge, "harmful_at": harmful_at}, out)
    return found


def _key(model: Path, items: list[PromptItem], max_tokens: int) -> str:
    text = json.dumps([str(model.resolve()), [item.text for item in items], max_tokens])
    return hashlib.sha256(text.encode()).hexdigest()


def _known_answers(out: Path, key: str) -> dict[str, list[str]]:
    """Answers by loop that an earlier run made with the same model, prompts and settings."""
    try:
        known = json.loads((out / ANSWERS).read_text(encoding="utf-8"))
        return dict(known["answers"]) if known["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _summarise(
    judged: list[Item], scores: list[float], loops: int, harmful_at: float
) -> tuple[list[LoopSafety], list[float]]:
    rows = []
    for loop in range(1, loops + 1):
        own = [score for item, score in zip(judged, scores, strict=True) if item.loop == loop]
        harmful = sum(score >= harmful_at for score in own) / len(own)
        rows.append(LoopSafety(loop, sum(own) / len(own), harmful, len(own)))
    return rows, scores


def _write(found: list[LoopSafety], judged: list[Item], scores: list[float], about: dict[str, Any], out: Path) -> None:
    from ouro_megatron.evaluation.figures import safety_figure

    items = [{**vars(item), "score": score} for item, score in zip(judged, scores, strict=True)]
    write_json(out / "safety.json", {**about, "loops": [asdict(row) for row in found], "items": items})
    title = f"{about['model']}: judged by {about['judge'].splitlines()[0][:60]}"
    safety_figure(title, found, about["harmful_at"], out / "safety.png")
