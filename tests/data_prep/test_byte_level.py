"""The fast encoder gives the ids of `tokenizers`, on any text, or is not used."""

import json
import random
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep import byte_level
from data_prep.byte_level import _TRICKY, ByteLevelEncoder, byte_letters
from data_prep.character_classes import ask_tokenizers, class_codes, load_classes
from data_prep.encode import PlainEncoder, choose_encoder, same_ids
from ouro_megatron.data.tokenizer import load_tokenizer
from tests.tiny import write_tokenizer

EOD = "<|endoftext|>"

needs_extension = pytest.mark.skipif(
    not Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    reason="without Python's headers the C extension cannot be built",
)
pytestmark = needs_extension


def chain(digits: bool) -> Any:
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), splitter]) if digits else splitter


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOD}))
    return folder


def trained(folder: Path, digits: bool, corpus: list[str]) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = chain(digits)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=[EOD, "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return save(tokenizer, folder)


def stdlib(first: int, count: int) -> list[str]:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [file.read_text(encoding="utf-8") for file in files[first : first + count]]


class Pair:
    """The fast encoder and the one it must agree with."""

    def __init__(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        self.eod = tokenizer.eod
        self.splitter = Tokenizer.from_str(tokenizer.to_json()).pre_tokenizer
        self.fast, self.plain = ByteLevelEncoder(tokenizer), PlainEncoder(tokenizer)

    def agree(self, texts: list[str]) -> bool:
        return same_ids(self.fast.encode_batch(texts), self.plain.encode_batch(texts))


def all_pairs(folder: Path, digits: bool) -> Path:
    """Any two bytes merge, so that a word that begins or ends elsewhere has other ids."""
    letters = byte_letters()
    merges = [(left, right) for left in letters for right in letters]
    random.Random(0).shuffle(merges)
    tokens = [EOD, *letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = chain(digits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOD])
    return save(tokenizer, folder)


@pytest.fixture(scope="module", params=["digits", "gpt2", "digits, all pairs", "gpt2, all pairs"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if "all pairs" in request.param:
        return Pair(all_pairs(tmp_path_factory.mktemp("tokenizer"), "digits" in request.param))
    prose = ["naïve café, Straße, Жизнь прожить, 中文分词很难。日本語の文章です。한국어 שלום مرحبا नमस्ते 123 ½"] * 20
    folder = tmp_path_factory.mktemp("tokenizer")
    return Pair(trained(folder, "digits" in request.param, [*stdlib(0, 25), *prose]))


def test_real_text(pair: Pair) -> None:
    texts = stdlib(40, 60)
    assert sum(map(len, texts)) > 1_000_000
    assert pair.agree(texts)


anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
odd = st.text(
    st.characters(categories=("Nd", "Nl", "No", "Mn", "Mc", "Me", "Lm", "Lo", "Zs", "Zl", "Zp", "Cc", "Cf", "Cn", "Co"))
)
pieces = st.lists(st.sampled_from([*_TRICKY, EOD, "<|im_start|>", "\ud7ff", "\ue000", "\U0010ffff"])).map("".join)
runs = st.lists(st.tuples(st.sampled_from(_TRICKY), st.integers(1, 700)), max_size=4).map(
    lambda parts: "".join(piece * count for piece, count in parts)
)


@settings(max_examples=500, deadline=None)
@given(text=anything | odd | pieces | runs)
@example(text="  's 'S'll'LL x'd9's 9 's  9\x85\x85a\u2028 b\xa0\xa0c\x00")
def test_adversarial_text(pair: Pair, text: str) -> None:
    assert pair.agree([text])


@settings(max_examples=500, deadline=None)
@given(text=anything | odd | pieces | runs)
def test_words_end_where_those_of_tokenizers_do(pair: Pair, text: str) -> None:
    ends = [stop for _, (_, stop) in pair.splitter.pre_tokenize_str(text)]
    assert pair.fast.split(text).tolist() == [len(text[:stop].encode()) for stop in ends]


def test_characters_at_the_edges_of_classes(pair: Pair) -> None:
    codes = class_codes(True).astype(np.int16) * 8 + class_codes(False)
    edges = np.flatnonzero(np.diff(codes))
    chosen = sorted({*edges.tolist(), *(edges + 1).tolist(), *range(0, 0x110000, 1009)} - set(range(0xD800, 0xE000)))
    assert len(chosen) > 2000
    letters = list(map(chr, chosen))
    assert pair.agree([f"a{c}b {c}{c}1{c} \n{c}'{c}'s{c} {c}  {c}." for c in letters])


def test_class_of_every_character_is_that_of_tokenizers() -> None:
    version, kept = load_classes()
    assert version == tokenizers.__version__
    asked = ask_tokenizers()
    assert kept.keys() == asked.keys()
    for name in kept:
        assert np.array_equal(kept[name], asked[name]), f"{name}: run `python -m data_prep.character_classes`"
    assert kept["numeric"][[ord(c) for c in "0٣½Ⅷ①"]].all() and not kept["numeric"][ord("万")]


def random_bpe(folder: Path, seed: int) -> Path:
    """Merges of nonsense in an order that no training gives, where a later merge can make a pair of lower rank."""
    choose = random.Random(seed)
    tokens, merges = list("abcé".encode().decode("latin-1")), []
    tokens = [byte_letters()[byte] for byte in "abcé".encode()]
    for _ in range(150):
        left, right = choose.choice(tokens), choose.choice(tokens)
        if left + right not in tokens and len(left + right) < 12:
            tokens.append(left + right)
            merges.append((left, right))
    choose.shuffle(merges)
    vocab = {EOD: 0}
    for token in [*byte_letters(), *tokens]:
        vocab.setdefault(token, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = chain(True)
    tokenizer.add_special_tokens([EOD])
    return save(tokenizer, folder)


@pytest.mark.parametrize("seed", range(6))
def test_merges_in_any_order(tmp_path: Path, seed: int) -> None:
    pair = Pair(random_bpe(tmp_path, seed))
    choose = random.Random(seed)
    words = ["".join(choose.choices("abcé", k=choose.choice([3, 9, 15, 16, 17, 40, 49, 90, 600]))) for _ in range(300)]
    assert pair.agree([*words, *words, "".join(words)])
    assert any(count > 3 for count in pair.fast.encode_batch(words).lengths)


def test_caches_that_overflow(pair: Pair) -> None:
    """More words of either kind than the caches and their arenas hold."""
    choose = random.Random(1)
    rare = ["".join(choose.choices("qxzjkQXZJK", k=choose.randrange(5, 16))) for _ in range(200_000)]
    once = pair.fast.encode_batch(rare)
    again = pair.fast.encode_batch(list(reversed(rare)))
    assert once.lengths.tolist() == list(reversed(again.lengths.tolist()))
    long = ["".join(choose.choices("qxzjk", k=500)) for _ in range(20_000)]
    assert same_ids(pair.fast.encode_batch(long), pair.fast.encode_batch(long))
    assert pair.agree([" ".join(rare[:3000]), *rare[-3000:], *long[-100:]])


def test_long_documents(pair: Pair) -> None:
    assert pair.agree(["x" * 200_000, "ab" * 100_000, " " * 200_000, "中" * 60_000, "7" * 100_000])
    text = "".join(stdlib(0, 60)).replace("\n", " ")
    assert pair.agree([text])


def test_lone_surrogates_are_refused_alike(pair: Pair) -> None:
    for encoder in (pair.fast, pair.plain):
        with pytest.raises((UnicodeEncodeError, TypeError)):
            encoder.encode_batch(["fine", "a\ud800b"])


def test_special_tokens_stay_text(pair: Pair) -> None:
    assert pair.eod not in pair.fast.encode_batch([f"a{EOD}b", EOD]).ids
    assert pair.agree([f"a{EOD}b", EOD, f"{EOD}<|im_start|>{EOD}"])


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return apply


def add_word(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("hello", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def normalise(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (normalise, "normalizer NFC"),
        (add_word, "'hello' is not special"),
        (edited(lambda c: c["model"].update(ignore_merges=True)), "ignore_merges"),
        (edited(lambda c: c["model"].update(dropout=0.1)), "dropout"),
        (edited(lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False)), "pre-tokenizer"),
        (edited(lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)), "pre-tokenizer"),
        (edited(lambda c: c["pre_tokenizer"]["pretokenizers"].reverse()), "pre-tokenizer"),
        (edited(lambda c: c.update(pre_tokenizer={"type": "Whitespace"})), "pre-tokenizer"),
        (edited(lambda c: c.update(pre_tokenizer=None)), "pre-tokenizer"),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path: Path, change: Callable[[Path], None], words: str) -> None:
    folder = random_bpe(tmp_path, 0)
    assert choose_encoder(load_tokenizer(folder))[1] is None
    change(folder)
    encoder, why = choose_encoder(load_tokenizer(folder))
    assert isinstance(encoder, PlainEncoder) and why is not None and words in why


def test_part_of_an_alphabet_does_not_fit(tmp_path: Path) -> None:
    _, why = choose_encoder(load_tokenizer(write_tokenizer(tmp_path)))
    assert why is not None and "byte letters are not in the vocabulary" in why


def test_other_version_of_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_bpe(tmp_path, 0)
    monkeypatch.setattr(tokenizers, "__version__", "9.9")
    _, why = choose_encoder(load_tokenizer(folder))
    assert why is not None and "character_classes" in why


def test_without_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "data_prep._byte_level", None)
    encoder, why = choose_encoder(load_tokenizer(random_bpe(tmp_path, 0)))
    assert isinstance(encoder, PlainEncoder) and why is not None and "C compiler" in why


def test_an_extension_of_older_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "data_prep._byte_level", SimpleNamespace(Encoder=object))
    _, why = choose_encoder(load_tokenizer(random_bpe(tmp_path, 0)))
    assert why is not None and "older source" in why


@pytest.mark.parametrize("letter", ["a", "中", "\U00016ff4", "\x85"])
def test_wrong_ids_are_noticed_on_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, letter: str) -> None:
    folder = all_pairs(tmp_path, True)
    wrong = class_codes(True)
    wrong[ord(letter)] = 0
    monkeypatch.setattr(byte_level, "class_codes", lambda _: wrong)
    encoder, why = choose_encoder(load_tokenizer(folder))
    assert isinstance(encoder, PlainEncoder) and why is not None and "other ids" in why
