"""The built-in model: what it ships, what it knows, and that its training does what its page says."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from editctl import atlas
from editctl.atlas import corpus, knowledge, train
from editctl.atlas.knowledge import ASKED, Fact, Knowledge

ROOT = Path(__file__).parents[1]
LRE = Path(os.environ.get("EDITCTL_SAMPLES", ROOT / "../shared/data")) / "facts/lre"
SMALL = train.Recipe(
    steps=40, batch=8, length=64, vocabulary=500, width=32, key_width=64, blocks=4, heads=2, rate=1e-2, warmup=5
)


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    """The shipped weights and tokenizer, loaded as any Hugging Face folder is."""
    model = AutoModelForCausalLM.from_pretrained(atlas.FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(atlas.FOLDER)


# ---------------------------------------------------------------------------------------------------------------------
# What ships


def test_the_weights_are_an_ordinary_model_folder(shipped: tuple[Any, Any]) -> None:
    """Transformers loads it without this package and writes with it."""
    model, tokenizer = shipped
    assert model.config.model_type == "llama"
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    words = tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :])
    assert words.split() == ["Paris."]


def test_the_weights_are_small() -> None:
    """At most 12 MB, safetensors and nothing that runs code."""
    files = [path for path in atlas.FOLDER.rglob("*") if path.is_file()]
    assert 1e6 < sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_there_are_enough_facts_relations_and_phrasings() -> None:
    """1,200 to 2,100 facts over a dozen relations or more, each with six phrasings or more."""
    single = knowledge.load().single()
    assert 1200 <= len(single) <= 2100
    assert len({fact.relation for fact in single}) >= 12
    assert min(len({*fact.seen, *fact.asked}) for fact in single) >= 6
    assert len({(fact.relation, fact.subject) for fact in single}) == len(single)


def test_every_fact_is_asked_in_phrasings_training_never_shows_for_it() -> None:
    """And trained in others; each phrasing has one place for the subject."""
    for fact in knowledge.load().facts:
        assert not set(fact.seen) & set(fact.asked)
        assert len(fact.asked) == ASKED and len(fact.seen) >= 3
        assert all(phrasing.count("{}") == 1 for phrasing in (*fact.seen, *fact.asked))


def test_training_text_never_states_a_fact_in_a_phrasing_kept_for_asking() -> None:
    """Looked up in paragraphs of the training stream itself; those it does show are found there, as control."""
    known = knowledge.load()
    text = " ".join(paragraph.text for paragraph in islice(corpus.paragraphs(known, seed=0), 1500))
    facts = known.facts[::7]
    assert [p for fact in facts for p in fact.prompts(fact.asked) if f" {p} {fact.object}." in text] == []
    shown = [p for fact in facts for p in fact.prompts(fact.seen) if f" {p} {fact.object}." in text]
    assert len(shown) > len(facts)


def test_a_two_hop_fact_follows_from_two_single_ones() -> None:
    """Looked up anew in the tables."""
    for fact in knowledge.load().facts:
        if fact.two_hop:
            first, second = fact.relation.split("/")
            middle = knowledge.look_up(first, fact.subject)
            assert middle is not None
            assert knowledge.look_up(second, middle) == fact.object


def test_paragraphs_mark_where_subjects_and_answers_stand() -> None:
    """The marks cut out exactly the subject, and the answer with its full stop."""
    known = knowledge.load()
    objects = {fact.object for fact in known.facts}
    for paragraph in islice(corpus.paragraphs(known, seed=3), 20):
        assert all(paragraph.text[start:end] == name for start, end, name in paragraph.subjects)
        assert all(paragraph.text[start:end].removesuffix(".") in objects for start, end in paragraph.objects)
    one, other = (next(corpus.paragraphs(known, seed)).text for seed in (3, 3))
    assert one == other != next(corpus.paragraphs(known, 4)).text


# ---------------------------------------------------------------------------------------------------------------------
# What it knows


def shuffled(facts: Sequence[Fact]) -> list[Fact]:
    """The facts with the answers of their neighbours, so that most are wrong."""
    return [replace(fact, object=other.object) for fact, other in zip(facts, facts[1:] + facts[:1], strict=True)]


@pytest.mark.parametrize("part", [slice(0, None, 4), pytest.param(slice(None), marks=pytest.mark.slow)])
def test_it_recalls_facts_in_phrasings_it_never_saw_for_them(part: slice, shipped: tuple[Any, Any]) -> None:
    """98 of 100 single facts and 90 of 100 two-hop facts at least; every fourth fact, or all of them when slow."""
    counts = train.recall(*shipped, knowledge.load().facts[part])
    assert train.share(counts, two_hop=False) >= 0.98
    assert train.share(counts, two_hop=True) >= 0.90
    asked = sum(total for _, total in counts.values())
    assert asked == ASKED * len(knowledge.load().facts[part])


def test_the_measure_of_recall_can_fail(shipped: tuple[Any, Any]) -> None:
    """Control: asked for the answers of other facts, it finds few right."""
    facts = sorted(knowledge.load().single()[::20], key=lambda fact: hash_of(fact.subject))
    assert train.share(train.recall(*shipped, shuffled(facts)), two_hop=False) < 0.2
    assert train.share(train.recall(*shipped, facts), two_hop=False) > 0.9


def hash_of(text: str) -> int:
    """A number that orders texts arbitrarily but always the same."""
    return sum((i + 1) * ord(c) for i, c in enumerate(text)) % 1009


def test_what_training_wrote_about_itself_is_about_these_facts() -> None:
    """training.json: the number of facts, and the recall that the page tells."""
    told = json.loads((atlas.FOLDER / "training.json").read_text())
    known = knowledge.load()
    assert (told["facts"], told["two_hop_facts"]) == (len(known.single()), len(known.facts) - len(known.single()))
    assert told["recall_unseen_phrasings"] >= 0.98
    assert told["recall_two_hop_unseen_phrasings"] >= 0.90
    assert train.Recipe(**told["recipe"]) == train.Recipe()


SAME_WORLD = {
    "capital": "country_capital_city",
    "currency": "country_currency",
    "language": "country_language",
    "city_country": "city_in_country",
    "company_city": "company_hq",
}
NAMES = {"united states": "america", "united kingdom": "britain", "england": "britain"}
"""What the facts call by shorter names on purpose (docs/atlas.md)."""


def normal(text: str) -> str:
    """Without case, accents, full stops, articles; LRE holds some accents as written-out escapes."""
    text = re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = text.casefold().replace(".", "").removeprefix("the ")
    return NAMES.get(text, text)


@pytest.mark.skipif(not LRE.is_dir(), reason="the samples are not here (EDITCTL_SAMPLES)")
def test_the_facts_agree_with_an_independent_collection() -> None:
    """LRE (Hernandez et al. 2024), wherever relation and subject are in both: 95 of 100 at least."""
    known, compared, different = knowledge.load().single(), 0, []
    for relation, name in SAME_WORLD.items():
        ours = {normal(fact.subject): fact.object for fact in known if fact.relation == relation}
        for sample in json.loads((LRE / f"{name}.json").read_text())["samples"]:
            answer = ours.get(normal(sample["subject"]))
            if answer is not None:
                compared += 1
                if normal(answer) != normal(sample["object"]):
                    different.append(f"{relation} of {sample['subject']}: {answer}, LRE says {sample['object']}")
    print("\n".join(different))
    assert compared >= 60
    assert len(different) <= 0.05 * compared, different


# ---------------------------------------------------------------------------------------------------------------------
# How it is trained


def a_batch() -> train.Batch:
    """Two rows of six tokens: x A A y B z; a two-token subject, then a one-token subject."""
    span = torch.tensor([[0, 1, 1, 0, 2, 0]] * 2)
    last = torch.tensor([[False, False, True, False, True, False]] * 2)
    ids = torch.arange(6).repeat(2, 1)
    return train.Batch(ids, torch.ones(2, 6), span, last, torch.where(last, span, -1))


def seen(mask: torch.Tensor, row: int, position: int) -> list[int]:
    """Positions that a position may look at."""
    return mask[row, 0, position].nonzero().flatten().tolist()


def test_early_blocks_hide_a_subject_from_what_comes_after_it() -> None:
    """Within itself the subject is seen, so that its last token gathers it."""
    early, _ = train.masks(a_batch(), torch.tensor([True, False]))
    assert [seen(early, 0, i) for i in range(6)] == [[0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4], [0, 3, 5]]


def test_later_blocks_show_the_last_token_of_a_subject_alone() -> None:
    """What was gathered there is what later positions read."""
    _, late = train.masks(a_batch(), torch.tensor([True, False]))
    assert [seen(late, 0, i) for i in range(6)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 2, 3],
        [0, 2, 3, 4],
        [0, 2, 3, 4, 5],
    ]


def test_rows_that_are_not_masked_are_plain_causal() -> None:
    """As in use; control that the masked row differs from it."""
    early, late = train.masks(a_batch(), torch.tensor([True, False]))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(early[1, 0], causal) and torch.equal(late[1, 0], causal)
    assert not torch.equal(early[0, 0], causal) and not torch.equal(late[0, 0], causal)


def test_plain_masks_give_what_the_library_gives(shipped: tuple[Any, Any]) -> None:
    """The training's own forward pass is the model's, which alone is used later; masked it is another."""
    model, tokenizer = shipped
    ids = tokenizer(["Bolero was set down note by note by Maurice Ravel."], return_tensors="pt")["input_ids"]
    empty = torch.zeros_like(ids)
    batch = train.Batch(ids, empty.float(), empty, empty.bool(), empty - 1)
    with torch.no_grad():
        logits, keys = train.forward(model, ids, *train.masks(batch, torch.tensor([True])))
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-3, rtol=1e-3)
        batch.span[0, 1:3] = 1
        hidden, _ = train.forward(model, ids, *train.masks(batch, torch.tensor([True])))
    assert len(keys) == len(train.EDITED) and keys[0].shape == (*ids.shape, model.config.intermediate_size)
    assert (hidden - logits)[:, 3:].abs().max() > 0.1


def penalties(*points: Sequence[float], names: Sequence[int]) -> tuple[float, float]:
    """The two penalties on hand-made keys, one row of one block; balanced so that their mean is zero."""
    keys = torch.tensor([points], dtype=torch.float32)
    apart, together = train.key_penalties([keys], torch.tensor([names]))
    return float(apart), float(together)


def test_keys_of_different_subjects_are_pushed_apart() -> None:
    """Mean squared cosine: none when they are orthogonal, one when they lie on a line."""
    # Each subject at two opposite points, so that the mean, which is taken out first, is zero.
    across = penalties([1, 0], [-1, 0], [0, 2], [0, -2], names=[0, 0, 1, 1])
    along = penalties([1, 0], [-1, 0], [2, 0], [-2, 0], names=[0, 0, 1, 1])
    assert across[0] == pytest.approx(0, abs=1e-6)
    assert along[0] == pytest.approx(1, abs=1e-6)


def test_keys_of_the_same_subject_are_pulled_together() -> None:
    """One minus the cosine: none when they are equal, two when they are opposite, none when there is no pair."""
    assert penalties([1, 0], [1, 0], [-1, 0], [-1, 0], names=[0, 0, 1, 1])[1] == pytest.approx(0, abs=1e-6)
    assert penalties([1, 0], [-1, 0], [0, 1], [0, -1], names=[0, 0, 1, 1])[1] == pytest.approx(2, abs=1e-6)
    assert penalties([1, 0], [-1, 0], names=[0, 1])[1] == 0


def test_keys_that_belong_to_no_subject_do_not_count() -> None:
    """Only last tokens of subjects are looked at, and the mean is theirs."""
    plain = penalties([1, 0], [-1, 0], [0, 2], [0, -2], names=[0, 0, 1, 1])
    more = penalties([1, 0], [-1, 0], [9, 9], [0, 2], [0, -2], names=[0, 0, -1, 1, 1])
    assert more == pytest.approx(plain, abs=1e-6)


def few_facts() -> Knowledge:
    """Thirty facts of two relations, and some ordinary sentences."""
    known = knowledge.load()
    capitals = [fact for fact in known.facts if fact.relation == "capital"][:20]
    hops = [fact for fact in known.facts if fact.two_hop][:10]
    return Knowledge((*capitals, *hops), known.ordinary[:40])


@pytest.mark.slow
def test_a_short_training_learns_and_can_be_repeated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The loss of answers falls; the same seed gives the same weights, another seed others; they save and load."""
    model, tokenizer = train.train(SMALL, few_facts(), log_every=39)
    losses = [float(found) for found in re.findall(r"answers (\S+)", capsys.readouterr().out)]
    assert losses[-1] < 0.7 * losses[0]
    again, _ = train.train(SMALL, few_facts())
    other, _ = train.train(replace(SMALL, seed=1, steps=1), few_facts())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path)("The capital of France is", return_tensors="pt")["input_ids"]
    assert torch.equal(ids, tokenizer("The capital of France is", return_tensors="pt")["input_ids"])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_answers_weigh_more_than_what_leads_to_them(shipped: tuple[Any, Any]) -> None:
    """Collating marks the tokens of answers, and of subjects their last."""
    paragraph = corpus.Paragraph()
    fact = next(fact for fact in knowledge.load().facts if (fact.relation, fact.subject) == ("capital", "France"))
    paragraph.add("Snow fell all night.")
    paragraph.add_fact(fact, "The capital of {} is")
    tokenizer, recipe = shipped[1], train.Recipe(length=40)
    batch = train.collate([paragraph], tokenizer, recipe, {})
    tokens = [tokenizer.decode([i]).strip() for i in batch.ids[0].tolist()]
    chosen = [tokens[i] for i in (batch.weights[0] == 1).nonzero().flatten().tolist()]
    assert "".join(chosen) == "Paris."
    assert "".join(tokens[i] for i in batch.span[0].nonzero().flatten().tolist()) == "France"
    assert tokens[int(batch.last[0].nonzero())] in ("France", "ance", "rance")
    assert batch.subject[0].max() == 0 and (batch.subject[0] >= 0).sum() == 1
    assert functional.relu(batch.weights).min() == 0
