"""Fluency, consistency, essence: hand-computed cases, and texts that are empty, broken or cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editctl.engine.sampling import LENGTH, TOP, sampled
from editctl.errors import InvalidInput
from editctl.metrics.consistency import Weights, consistency, ordinary, resemblance, terms
from editctl.metrics.fluency import SAMPLED, entropy, fluency, weighted, words
from editctl.metrics.text import ESSENCE_TOKENS, essence, essences, perplexity

# Words

WORDS = [
    ("", []),
    ("   \n", []),
    ("Paris", ["Paris"]),
    ("He left.", ["He", "left", "."]),
    ("He left. She came.", ["He", "left", ".", "She", "came", "."]),
    (
        "Mr. Smith of the U.S. came. J. Doe left.",
        ["Mr.", "Smith", "of", "the", "U.S.", "came", ".", "J.", "Doe", "left", "."],
    ),
    ("It is approx. five.", ["It", "is", "approx.", "five", "."]),
    ("I can't, cannot and won't", ["I", "ca", "n't", ",", "can", "not", "and", "wo", "n't"]),
    ("Ada's dogs' bones", ["Ada", "'s", "dogs", "'", "bones"]),
    ('She said: "No!" (twice)', ["She", "said", ":", "``", "No", "!", "''", "(", "twice", ")"]),
    ("1,000 at 3.50, $5; 10:30", ["1,000", "at", "3.50", ",", "$", "5", ";", "10:30"]),
    ("well-known -- or not...", ["well-known", "--", "or", "not", "..."]),
    ("“curly” — dash", ["“", "curly", "”", "—", "dash"]),
    ("a [b] {c} <d>", ["a", "[", "b", "]", "{", "c", "}", "<", "d", ">"]),
]
"""What nltk's word_tokenize makes of them, checked with nltk 3.10."""


@pytest.mark.parametrize(("text", "found"), WORDS)
def test_words_are_those_of_the_treebank_convention(text: str, found: list[str]) -> None:
    """Marks apart, clitics apart, numbers and abbreviations whole."""
    assert words(text) == found


@given(st.text(alphabet="aB1 .,:;'\"`-!?()\n“”’—", max_size=80))
def test_no_character_is_lost_or_made_up(text: str) -> None:
    """But white space; straight quotes become `` or ''."""

    def kept(some: str) -> str:
        return some.translate(dict.fromkeys(map(ord, "\"'`")))

    assert kept("".join(words(text))) == kept("".join(text.split()))


# Fluency


def test_the_entropy_of_pairs_and_triples_is_that_by_hand() -> None:
    """Of a b a b a: pairs ab ba ab ba, one bit; triples aba bab aba, log₂ 3 − 2/3 bits."""
    found = ["a", "b", "a", "b", "a"]
    assert entropy(found, 2) == pytest.approx(1.0)
    assert entropy(found, 3) == pytest.approx(math.log2(3) - 2 / 3)
    assert weighted("a b a b a") == pytest.approx(100 * (2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2)
    # Control: the weights are not the other way round, nor equal.
    assert weighted("a b a b a") != pytest.approx(100 * (4 / 3 * 1 + 2 / 3 * (math.log2(3) - 2 / 3)) / 2)


def test_words_that_are_all_different_reach_the_bound() -> None:
    """log₂ of the number of pairs and of triples; repeating a text that is repeated lowers it."""
    text = " ".join(f"w{i}" for i in range(10))
    assert weighted(text) == pytest.approx(100 * (2 / 3 * math.log2(9) + 4 / 3 * math.log2(8)) / 2)
    assert weighted("the same " * 30) < 110 < weighted(text)


@pytest.mark.parametrize("text", ["", "   ", "word", "two words", "..."])
def test_a_text_of_fewer_than_three_words_has_no_entropy(text: str) -> None:
    """It counts as nothing, rather than being left out of the mean."""
    assert weighted(text) == 0.0
    assert math.copysign(1, weighted(text)) == 1


def test_fluency_is_the_mean_over_texts_with_its_protocol_and_interval() -> None:
    """None without texts; no interval of one text; not a number when a text is none."""
    texts = ["a b a b a", "one two three four", ""]
    found = fluency(texts)
    assert found is not None
    assert found.value == pytest.approx(sum(map(weighted, texts)) / 3)
    assert (found.name, found.protocol, found.n, found.higher_is_better) == ("fluency", SAMPLED, 3, True)
    assert found.low == 0.0 and found.high is not None and found.high > found.value
    assert fluency([]) is None
    alone = fluency(["a b a b a"])
    assert alone is not None and (alone.low, alone.high) == (None, None)
    broken = fluency(["a b a b a", None])
    assert broken is not None and math.isnan(broken.value) and broken.low is None


# Sampling

OPENINGS = ("The Eiffel Tower is", "Ada", "In the summer, Marie Curie worked in Warsaw and", "Rome", "The capital of")


def test_a_text_does_not_change_with_those_written_beside_it(model: Any) -> None:
    """Openings of several lengths in one batch; each alone; another order. Control: another seed."""
    together = sampled(model, OPENINGS, seed=3, length=40)
    assert [sampled(model, [opening], seed=3, length=40)[0] for opening in OPENINGS] == together
    assert sampled(model, OPENINGS[::-1], seed=3, length=40)[::-1] == together
    assert sampled(model, OPENINGS, seed=4, length=40) != together
    assert len(set(together)) == len(OPENINGS)


def test_a_text_begins_with_its_opening_and_has_the_length_asked_for(model: Any) -> None:
    """In tokens, opening and start token included; at most what the model reads."""
    heard: list[int] = []
    for text, opening in zip(sampled(model, OPENINGS, length=30, tick=heard.append), OPENINGS, strict=True):
        assert text is not None and text.strip().startswith(opening)
    assert sum(heard) == len(OPENINGS)


def test_the_protocol_is_the_one_of_the_papers() -> None:
    """A hundred tokens, drawn from five; an essence of a hundred."""
    assert (LENGTH, TOP, ESSENCE_TOKENS) == (100, 5, 100)


@pytest.fixture
def as_ids(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is sampled as numbers of tokens: random bytes read back would be cut into others."""
    monkeypatch.setattr(model.tokenizer, "decode", lambda row, **_: " ".join(map(str, row)), raising=False)
    return lambda openings, length: [
        [int(token) for token in (text or "").split()] for text in sampled(model, openings, length=length)
    ]


@torch.no_grad()
def test_every_token_is_one_of_the_most_probable_and_not_always_the_first(model: Any, as_ids: Any) -> None:
    """By passes of their own, without a cache; openings of several lengths stay as they are."""
    firsts = []
    for opening, ids in zip(OPENINGS, as_ids(OPENINGS, 30), strict=True):
        start = len(model.encode(opening))
        assert ids[:start] == model.encode(opening) and len(ids) == 30
        for place in range(start, 30):
            best = model.net(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1].topk(TOP).indices
            assert ids[place] in best
            firsts.append(ids[place] == best[0])
    assert 0.2 < sum(firsts) / len(firsts) < 0.95


@torch.no_grad()
def test_tokens_are_drawn_in_proportion_to_their_probabilities(model: Any, as_ids: Any) -> None:
    """Of 1,500 draws of the next token. Control: not one in five each."""
    ids = model.encode("Rome")
    drawn = [row[-1] for row in as_ids(["Rome"] * 1500, len(ids) + 1)]
    best = model.net(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1).topk(TOP)
    wanted = (best.values / best.values.sum()).tolist()
    shares = [drawn.count(token) / len(drawn) for token in best.indices.tolist()]
    # Four standard deviations of a share are at most 2 / √1500.
    assert shares == pytest.approx(wanted, abs=0.052)
    assert wanted != pytest.approx([0.2] * TOP, abs=0.052)


def test_a_repeated_opening_gets_another_text(model: Any) -> None:
    """Benchmarks name the same one more than once; a copy would count as evidence."""
    first, second, third = sampled(model, ["Rome"] * 3, length=30)
    assert len({first, second, third}) == 3
    assert sampled(model, ["Rome"], length=30)[0] == first


def test_probabilities_that_are_no_numbers_make_no_text(model: Any) -> None:
    """None, rather than words that nobody drew."""
    block = model.blocks[0]
    kept = block.weight.clone()
    try:
        block.weight.fill_(math.nan)
        assert sampled(model, ["Rome", "Ada"], length=12) == [None, None]
    finally:
        block.weight.copy_(kept)
    assert None not in sampled(model, ["Rome", "Ada"], length=12)


def test_an_opening_that_leaves_no_room_is_refused(model: Any) -> None:
    """And an empty one, where the model has no start token to go on from."""
    with pytest.raises(InvalidInput, match="an opening of") as caught:
        sampled(model, ["Rome " * 60], length=20)
    assert caught.value.hint == "shorten it"
    if not model.encode(""):
        with pytest.raises(InvalidInput, match="0 tokens") as caught:
            sampled(model, [""], length=20)
        assert "no start token" in caught.value.hint
    assert sampled(model, [], length=20) == []


# Consistency


def test_weights_and_cosine_are_those_by_hand() -> None:
    """Three documents; "the" in all weighs 1, "cat" in one ln 2 + 1, a word in none ln 4 + 1."""
    table = Weights.of(["the cat", "the dog the", "the the fish"])
    cat, none = math.log(2) + 1, math.log(4) + 1
    assert [table.of_word(word) for word in ("the", "cat", "owl")] == pytest.approx([1.0, cat, none])
    assert table.vector("The cat, the CAT; a owl") == pytest.approx({"the": 2.0, "cat": 2 * cat, "owl": none})
    lengths = {"the cat": math.hypot(1, cat), "cat owl": math.hypot(cat, none), "the owl": math.hypot(1, none)}
    assert table.cosine("the cat", "cat owl") == pytest.approx(cat**2 / lengths["the cat"] / lengths["cat owl"])
    # Control: without weights it would be a half.
    little = 1 / lengths["the cat"] / lengths["the owl"]
    assert table.cosine("the cat", "the owl") == pytest.approx(little) and little < 0.3


def test_words_are_of_two_letters_or_more_whatever_the_case() -> None:
    """As scikit-learn's vectorizer has it."""
    assert terms("A B-52 in São Tomé, I'm OK") == ["52", "in", "são", "tomé", "ok"]


def test_a_text_resembles_itself_and_none_of_other_words() -> None:
    """1 and 0, and between them what shares some."""
    text = "The lamp hung over the old table."
    assert resemblance([text], [text]) == 1.0
    assert resemblance([text], ["Quick brown foxes jump"]) == 0.0
    some = resemblance([text], ["The lamp of the ship"])
    assert some is not None and 0 < some < 1
    assert resemblance(["the lamp", "old table"], ["old", "the table lamp"]) == pytest.approx(1.0)


def test_a_rare_word_in_common_counts_more_than_a_common_one() -> None:
    """By the 900 ordinary sentences, where "the" is common and Rome never stands."""
    assert ordinary().documents == 900
    rare = resemblance(["the gladiators"], ["some gladiators"])
    common = resemblance(["the gladiators"], ["the senators"])
    assert rare is not None and common is not None and rare > 2 * common


@pytest.mark.parametrize(
    ("texts", "references", "found"),
    [
        (["a lamp"], [], None),
        (["a lamp"], ["", " . "], None),
        ([], ["a lamp"], None),
        ([""], ["a lamp"], 0.0),
        (["a b c"], ["a lamp"], 0.0),
    ],
)
def test_nothing_to_compare_is_none_and_silence_is_zero(
    texts: list[str | None], references: list[str], found: float | None
) -> None:
    """The model's silence is its own; missing references are not."""
    assert resemblance(texts, references) == found


def test_consistency_is_the_mean_over_the_edits_that_have_one() -> None:
    """None without any; a text that is no text makes it no number."""
    found = consistency([0.2, None, 0.4])
    assert found is not None and (found.value, found.n, found.protocol) == (pytest.approx(0.3), 2, SAMPLED)
    assert found.low == 0.0 and found.high == 1.0
    assert consistency([None]) is None and consistency([]) is None
    broken = resemblance(["lamp", None], ["lamp"])
    assert broken is not None and math.isnan(broken)


# Essence


def by_hand(model: Any, text: str, most: int) -> tuple[float, int]:
    """exp of the mean loss of the tokens after the first, each from a pass of its own; and how many."""
    ids = model.encode(text)[:most]
    losses = []
    for place in range(1, len(ids)):
        logits = model.net(input_ids=torch.tensor([ids[:place]]), use_cache=False).logits[0, -1]
        losses.append(-float(logits.double().log_softmax(-1)[ids[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@torch.no_grad()
def test_an_essence_is_read_to_a_hundred_tokens_and_its_predicted_ones_are_counted(model: Any) -> None:
    """All but the first: a start token, or without one the text's own first. Controls: N in place of N − 1, and the
    text uncut."""
    long = "Ada Lovelace wrote the first program for a machine. " * 12
    short = "Rome was not built in a day."
    assert len(model.encode(long)) > ESSENCE_TOKENS
    found = essences(model, [long, short])
    (cut, tokens), (whole, few) = by_hand(model, long, ESSENCE_TOKENS), by_hand(model, short, ESSENCE_TOKENS)
    assert tokens == ESSENCE_TOKENS - 1 and few == len(model.encode(short)) - 1
    assert found == pytest.approx([cut, whole], rel=1e-4)
    assert found[1] != pytest.approx(whole ** (few / (few + 1)), rel=1e-3)
    assert found[0] != pytest.approx(by_hand(model, long, 120)[0], rel=1e-4)


def test_a_start_token_is_what_the_first_word_is_predicted_from(loaded: Any) -> None:
    """Llama's text of one token has a perplexity, GPT-2's has none; no text has one of nothing."""
    llama, gpt2 = loaded("llama"), loaded("gpt2")
    assert len(llama.encode("R")) == 2 and len(gpt2.encode("R")) == 1
    assert essences(llama, ["R", ""]) == [pytest.approx(by_hand(llama, "R", 100)[0], rel=1e-4), None]
    assert essences(gpt2, ["R", ""]) == [None, None]
    assert math.isnan(perplexity(gpt2, ["R", ""])) and math.isnan(perplexity(llama, []))


def test_a_perplexity_of_broken_weights_is_no_number(model: Any) -> None:
    """And one that no float holds is infinite, rather than an error."""
    block = model.blocks[0]
    kept = block.weight.clone()
    try:
        block.weight.fill_(math.nan)
        found = essences(model, ["Rome was not built in a day."])[0]
        assert found is not None and math.isnan(found)
        assert math.isnan(perplexity(model, ["Rome was not built in a day."]))
    finally:
        block.weight.copy_(kept)
    head = model.net.get_output_embeddings().weight
    kept = head.clone()
    try:
        head.mul_(1e5)
        assert perplexity(model, ["Rome was not built in a day."]) == math.inf
    finally:
        head.copy_(kept)


def test_essences_are_joined_by_their_geometric_mean() -> None:
    """Of 2 and 8 it is 4; those without are left out, and lower is better."""
    found = essence([2.0, None, 8.0])
    assert found is not None and (found.name, found.protocol) == ("essence", "teacher-forced")
    assert (found.value, found.n, found.higher_is_better) == (pytest.approx(4.0), 2, False)
    assert found.low is not None and found.high is not None and found.low * found.high == pytest.approx(16.0)
    assert essence([]) is None and essence([None]) is None
    for worst in (math.inf, math.nan):
        broken = essence([2.0, worst])
        assert broken is not None and not math.isfinite(broken.value) and broken.low is None
