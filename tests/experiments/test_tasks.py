"""Every task's examples: answers by an independent computation, counts, determinism."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from pydantic import ValidationError

from ouro_megatron.errors import RecipeError
from ouro_megatron.experiments.tasks.addition import Addition
from ouro_megatron.experiments.tasks.capo import Capo, known_bits
from ouro_megatron.experiments.tasks.examples import BOS, Examples
from ouro_megatron.experiments.tasks.mano import Mano
from ouro_megatron.experiments.tasks.multihop import MultiHop
from ouro_megatron.experiments.tasks.phop import PHop
from ouro_megatron.experiments.tasks.registry import make_task
from ouro_megatron.experiments.tasks.task import Task

TASKS: list[Task] = [
    Addition(digits=2, train_terms=[2, 5], test_terms=[5]),
    PHop(length=24, alphabet=3, hops=[1, 3, 6]),
    PHop(length=40, hops=[4]),
    Mano(operations=6, modulus=7),
    MultiHop(layers=5, entities=6, relations=3, hops=3, held_out=40),
    MultiHop(layers=4, entities=6, relations=3, hops=2, held_out=10, shorter=True),
    Capo(people=200, names=(10, 10, 10)),
]


def spelled(task: Task, examples: Examples, row: int) -> tuple[list[str], list[str]]:
    prompt, answer = examples.prompt_and_answer(row)
    return [task.words[token] for token in prompt], [task.words[token] for token in answer]


def drawn(task: Task, count: int = 300, seed: int = 3) -> Examples:
    return task.draw(count, np.random.default_rng(seed))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_the_same_generator_draws_the_same_examples_of_known_words(task: Task) -> None:
    first, second, other = drawn(task), drawn(task), drawn(task, seed=4)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.hashes(), second.hashes())
    assert not np.array_equal(first.tokens, other.tokens)
    assert len(first) == 300 and len(set(task.words)) == len(task.words) and task.words[0] == BOS
    assert first.tokens.min() >= 0 and first.tokens.max() < len(task.words)
    assert (first.tokens[:, 0] == 0).all()
    assert int(first.lengths.max()) <= task.longest
    assert (first.lengths > first.prompts).all() and (first.prompts > 0).all()


def test_equal_hashes_mean_equal_examples() -> None:
    examples = Mano(operations=1, modulus=5).draw(4000, np.random.default_rng(0))
    rows = {tuple(row) for row in examples.tokens.tolist()}
    assert len(rows) == 3 * 25 == len(np.unique(examples.hashes()))
    wide = Examples(np.pad(examples.tokens, ((0, 0), (0, 3))), examples.lengths, examples.prompts)
    assert len(np.unique(wide.hashes())) == len(rows)


def test_sums_are_right_and_all_lengths_occur() -> None:
    task = Addition(digits=3, train_terms=[2, 4, 7], test_terms=[4, 7])
    examples = drawn(task)
    counts: Counter[int] = Counter()
    for row in range(len(examples)):
        prompt, answer = spelled(task, examples, row)
        text = "".join(prompt[1:])
        assert text.endswith("=")
        numbers = text[:-1].split("+")
        assert all(len(number) == 3 for number in numbers)
        assert int("".join(answer)) == sum(int(number) for number in numbers)
        assert len(answer) == len(str(999 * len(numbers)))
        counts[len(numbers)] += 1
    assert set(counts) == {2, 4, 7} and min(counts.values()) > 60
    test = task.draw_test("n=7", 5, np.random.default_rng(0))
    assert "".join(spelled(task, test, 0)[0]).count("+") == 6
    assert task.possible == {"n=4": 10**12, "n=7": 10**21}


def follow(symbols: list[str], hops: int) -> str | None:
    """hop_p of the last symbol by its definition: find(i) = max{j <= i: symbols[j - 1] = symbols[i]}."""
    at = len(symbols) - 1
    for _ in range(hops):
        found = [j for j in range(1, at + 1) if symbols[j - 1] == symbols[at]]
        if not found:
            return None
        at = max(found)
    return symbols[at]


@pytest.mark.parametrize("task", [PHop(length=24, alphabet=3, hops=[1, 2, 3, 7]), PHop(length=64, hops=[9])], ids=str)
def test_hops_follow_the_definition(task: PHop) -> None:
    examples = drawn(task)
    for row in range(len(examples)):
        prompt, answer = spelled(task, examples, row)
        hops = int(prompt[1].removeprefix("p")) if len(task.hops) > 1 else task.hops[0]
        symbols = prompt[-task.length :]
        assert len(prompt) == 1 + (len(task.hops) > 1) + task.length
        assert answer == [follow(symbols, hops)]


def test_hops_by_hand() -> None:
    # a b c a b: from the last b to the place after the first b (c); from c nowhere.
    assert follow(list("abcab"), 1) == "c" and follow(list("abcab"), 2) is None
    assert PHop(length=4, alphabet=4, hops=[1]).possible == {"p=1": 256}


def value_of(words: list[str], modulus: int) -> tuple[Fraction, list[str]]:
    """Value of the prefix expression that `words` begin with, and what follows it: read from the left."""
    head, rest = words[0], words[1:]
    if head not in "+-*":
        return Fraction(int(head)), rest
    left, rest = value_of(rest, modulus)
    right, rest = value_of(rest, modulus)
    return {"+": left + right, "-": left - right, "*": left * right}[head], rest


def test_expressions_have_their_value() -> None:
    task = Mano(operations=9, modulus=23)
    examples = drawn(task, 500)
    sizes: Counter[int] = Counter()
    for row in range(len(examples)):
        prompt, answer = spelled(task, examples, row)
        operations = int(prompt[1].removeprefix("<len_").removesuffix(">"))
        value, rest = value_of(prompt[2:], 23)
        assert rest == ["<ans>"]
        assert sum(word in "+-*" for word in prompt[2:-1]) == operations
        assert int(answer[0]) == value % 23
        sizes[operations] += 1
    assert set(sizes) == set(range(1, 10)) and min(sizes.values()) > 25
    kinds = Counter(word for row in range(500) for word in spelled(task, examples, row)[0] if word in "+-*")
    assert max(kinds.values()) < 1.2 * min(kinds.values())


def test_expressions_are_counted_and_have_all_shapes() -> None:
    task = Mano(operations=3, modulus=2)
    test = task.draw_test("l=3", 60_000, np.random.default_rng(0))
    shapes = Counter(
        "".join("o" if word in "+-*" else "n" for word in spelled(task, test, r)[0][2:-1]) for r in range(3000)
    )
    assert len(shapes) == 5  # the Catalan number of three operations
    # By the rule in `source`: the root leaves 2 operations to one side or 1 to each, with chance 1/3 each.
    assert 0.29 < shapes["oonnonn"] / 3000 < 0.38
    assert len(np.unique(test.hashes())) == task.possible["l=3"] == 5 * 3**3 * 2**4


def test_multi_hop_answers_follow_the_world_and_held_out_questions_stay_out() -> None:
    task = MultiHop(layers=5, entities=7, relations=4, hops=3, held_out=60, shorter=True)
    world = task.world

    def answer_of(prompt: list[str]) -> str:
        number = int(prompt[-4].removeprefix("name_"))
        layer, place = divmod(number, 7)
        for word in reversed([word for word in prompt if word.startswith("relation_")]):
            place = int(world[int(word.removeprefix("relation_")), layer, place])
            layer += 1
        return f"name_{7 * layer + place}"

    train, test = drawn(task, 3000), task.draw_test("3 hops", 2000, np.random.default_rng(1))
    asked: dict[str, set[str]] = {"train": set(), "test": set()}
    for name, examples in (("train", train), ("test", test)):
        for row in range(len(examples)):
            prompt, answer = spelled(task, examples, row)
            assert prompt[-3:] == ["?", "\\n", "Answer:"] and answer == [answer_of(prompt)]
            if sum(word.startswith("relation_") for word in prompt) == 3:
                asked[name].add(" ".join(prompt))
    assert len(asked["test"]) == 60 and not asked["test"] & asked["train"]
    assert len(asked["train"]) + 60 <= task.possible["3 hops"] == 7 * 4**3
    few = task.model_copy(update={"questions": 30})
    assert len({tuple(row) for row in drawn(few, 2000).tokens.tolist() if row[7] >= 8 and row[10] >= 8}) >= 1
    alone = MultiHop(layers=5, entities=7, relations=4, hops=3, held_out=60, questions=30)
    assert len(np.unique(drawn(alone, 2000).hashes())) == 30


def test_paper_sizes_of_multi_hop_give_its_number_of_questions() -> None:
    assert MultiHop().possible == {"3 hops": 800_000}


def test_biographies_are_of_different_people_and_whole() -> None:
    task = Capo(people=500, names=(10, 10, 10))
    persons = task.persons()
    assert len({tuple(row[:3]) for row in persons.tolist()}) == 500
    examples = drawn(task, 1000)
    seen: dict[tuple[str, ...], set[str]] = {}
    orders = set()
    for row in range(1000):
        prompt, text = spelled(task, examples, row)
        assert prompt == [BOS] and len(text) == 17 and text[-1] == "."
        kinds = [word for word in text if word in ("birth_date", "birth_city", "university", "major", "employer")]
        assert len(kinds) == 5
        orders.add(tuple(kinds))
        facts = {f"{kind} {text[text.index(kind) + 1]}" for kind in kinds}
        assert seen.setdefault(tuple(text[:4]), facts) == facts, "a person's attributes never change"
    assert len(seen) == 500 and len(orders) > 100
    values = {word.rpartition("_")[0] for word in task.words[7:]}
    assert len(values) == 11


def test_bits_of_a_person_are_the_papers_and_capacity_is_the_bound() -> None:
    task = Capo(people=20_000)
    sizes = 2 * (12 * 28 * 200) * 200 * 300 * 100 * 263
    assert task.attribute_bits == pytest.approx(math.log2(sizes)) and round(task.attribute_bits, 1) == 47.6
    assert 2**task.name_bits == pytest.approx(400 * 400 * 1000)
    guessing = math.log(sizes)
    assert known_bits(task, 20 * math.log(2) + 100, guessing)[1] == pytest.approx(0, abs=1e-3)
    names, attributes = known_bits(task, math.log(20_000), 0.0)
    assert attributes == pytest.approx(20_000 * 47.5916, rel=1e-5)
    # Whoever knows exactly who exists knows which 20,000 of 1.6e8 names those are: log2 (N0 / N) a person.
    assert names == pytest.approx(20_000 * math.log2((1.6e8 - 20_000) / 20_000), rel=1e-6)


def test_name_and_value_places_cover_what_counts() -> None:
    task = Capo(people=50, names=(5, 5, 5))
    examples = task.biographies(np.tile(np.arange(5), (50, 1)))
    is_name, is_value = task.value_places(examples)
    assert (is_name.sum(1) == 3).all() and (is_value.sum(1) == 1 + 3 + 4).all() and not (is_name & is_value).any()
    assert next(task.words[i] for i in examples.tokens[0][is_value[0]]).startswith("pronoun_")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sorting"}, "known here: addition"),
        ({"kind": "mano", "modulus": 1}, "task.modulus"),
        ({"kind": "mano", "operation": 3}, "task.operation"),
        ({"kind": "multihop", "hops": 5}, "5 hops need more than 5 layers"),
        ({"kind": "multihop", "entities": 2, "relations": 2, "held_out": 16}, "16 are held out"),
        ({"kind": "phop", "hops": [0]}, "task.hops.0"),
    ],
)
def test_refuses_what_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_task(values, "settings.yaml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Mano().modulus = 5  # type: ignore[misc]
    assert list(itertools.islice(Mano().words, 2)) == [BOS, "<ans>"]
