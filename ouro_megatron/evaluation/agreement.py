"""`ouro analyse agreement`: which loops give the same answers as which?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ouro_megatron.checkpoint.folder import write_json
from ouro_megatron.errors import DataError, RecipeError
from ouro_megatron.evaluation.likelihood import Continuation
from ouro_megatron.evaluation.prompts import PromptItem, read_items
from ouro_megatron.evaluation.session import ModelSession, Prompt
from ouro_megatron.inference.exit_policy import ExitPolicy


@dataclass(frozen=True)
class LoopAgreement:
    """Answers of every loop, and how often two loops agree."""

    answers: list[list[str]]
    """[loop][prompt]: the chosen answer where a prompt has choices, else the generated text."""
    matrix: list[list[float]]
    """Share of prompts with the same answer at both loops."""
    prompts: int


def analyse_agreement(
    path: Path,
    prompts: Path,
    out: Path,
    *,
    loops: int = 8,
    max_tokens: int = 32,
    limit: int | None = None,
    batch: int = 8,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> LoopAgreement:
    """Greedy answers at each of `loops` loops and their agreement; writes `out`/agreement.json and agreement.png.

    Raises DataError for an unreadable file or a prompt longer than the model's sequences.
    """
    if loops < 1:
        raise RecipeError(f"--loops {loops}: at least 1")
    items = read_items(prompts, limit)
    session = ModelSession(path, device=device, batch=batch)
    try:
        answers = _answers(session, items, loops, max_tokens, progress)
        found = LoopAgreement(answers, agreement_matrix(answers), len(items))
        if session.context.rank == 0:
            _write(found, items, session.folder, prompts, out)
        return found
    finally:
        session.close()


def _answers(
    session: ModelSession, items: list[PromptItem], loops: int, max_tokens: int, progress: Callable[[str], None]
) -> list[list[str]]:
    """[loop][prompt]; first all choices, then all texts: the session holds either the scorer or the engine."""
    answers = [[""] * len(items) for _ in range(loops)]
    choosing = [index for index, item in enumerate(items) if item.choices]
    writing = [index for index, item in enumerate(items) if not item.choices]
    for kind in (choosing, writing):
        chosen = [items[index] for index in kind]
        for loop in range(1, loops + 1) if kind else ():
            progress(f"loop {loop} of {loops}: {'choices' if kind is choosing else 'texts'}")
            made = (
                chosen_at(session, chosen, loop, loops)
                if kind is choosing
                else written_at(session, chosen, loop, loops, max_tokens)
            )
            for index, answer in zip(kind, made, strict=True):
                answers[loop - 1][index] = answer
    return answers


def chosen_at(session: ModelSession, items: list[PromptItem], loop: int, loops: int) -> list[str]:
    """The likeliest of each prompt's choices, per token of theirs, when every token leaves at `loop`."""
    encode = session.tokenizer.encode
    wanted = [Continuation(encode(item.text), encode(f" {choice}")) for item in items for choice in item.choices]
    scored = iter(session.score(wanted, ExitPolicy(step=loop), loops, _length(session, items, 0)))
    answers = []
    for item in items:
        values = [next(scored).logprob / max(1, len(encode(f" {choice}"))) for choice in item.choices]
        answers.append(item.choices[values.index(max(values))])
    return answers


def written_at(session: ModelSession, items: list[PromptItem], loop: int, loops: int, max_tokens: int) -> list[str]:
    """Greedy text, up to `max_tokens`, when every token leaves at `loop` of at most `loops`."""
    prompts = [Prompt(tuple(session.tokenizer.encode(item.text)), max_tokens) for item in items]
    made = session.generate(prompts, ExitPolicy(step=loop), loops, _length(session, items, max_tokens))
    return [answer.text.strip() for answer in made]


def _length(session: ModelSession, items: list[PromptItem], max_tokens: int) -> int:
    """Positions that the longest prompt needs with its answer. Raises DataError when the model has fewer."""
    encode = session.tokenizer.encode
    needed = 0
    for number, item in enumerate(items, start=1):
        answer = max((len(encode(f" {choice}")) for choice in item.choices), default=max_tokens)
        length = len(encode(item.text)) + answer
        if length > session.max_length:
            raise DataError(
                f"prompt {number} needs {length} positions with its answer, the model's sequences have "
                f"{session.max_length}: shorten it or lower --max-tokens"
            )
        needed = max(needed, length)
    return needed


def agreement_matrix(answers: list[list[str]]) -> list[list[float]]:
    """Share of equal answers for each pair of loops; the diagonal is 1."""
    return [[sum(a == b for a, b in zip(one, other, strict=True)) / len(one) for other in answers] for one in answers]


def _write(found: LoopAgreement, items: list[PromptItem], model: Path, prompts: Path, out: Path) -> None:
    from ouro_megatron.evaluation.figures import matrix_figure

    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": item.text, "answers": [answers[index] for answers in found.answers]}
        for index, item in enumerate(items)
    ]
    write_json(
        out / "agreement.json", {"model": str(model), "prompts": str(prompts), "matrix": found.matrix, "items": rows}
    )
    matrix_figure(f"{model}: same answers, {found.prompts} prompts", found.matrix, out / "agreement.png")
