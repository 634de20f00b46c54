"""What the model says: the words `generate` would say, cut at the sentence's end, whoever else is asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from editctl.engine.model import Model
from editctl.engine.prompts import join
from editctl.engine.speak import NEW_TOKENS, answers, check_lengths, next_tokens, scores
from editctl.errors import InvalidInput

PROMPTS = (
    "The capital of Norway is",
    "Rome",
    "The Eiffel Tower is located in the city of",
    "People say that",
    "In the summer, Marie Curie",
    "What did the fox",
    "I think Ada was born in",
    "The quick brown",
    "Because Rome's roads were long, they",
    "You could see",
)


def by_generate(model: Model, prompt: str, at_least: int = 1, new_tokens: int = NEW_TOKENS) -> str:
    """Greedy words by Hugging Face's own loop, cut after the first token that ends a sentence."""
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    model.net.generation_config.eos_token_id = None  # the cut below decides, so that `at_least` can go beyond it
    whole = model.net.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, pad_token_id=0
    )
    kept: list[int] = []
    for token in whole[0, ids.shape[1] :].tolist():
        kept.append(token)
        ends = token == model.tokenizer.eos_token_id or model.tokenizer.decode([token])[-1:] in set(".!?\n")
        if ends and len(kept) >= at_least:
            break
    text = " ".join(model.tokenizer.decode(kept, skip_special_tokens=True).split())
    return text[:-1].rstrip() if text.endswith(".") else text


@pytest.fixture
def talkative(model: Model) -> Any:
    """A model that ends sentences now and then: the output row of the full stop leans towards every state."""
    stop = model.tokenizer.convert_tokens_to_ids(".")
    head = model.net.get_output_embeddings().weight
    old = head[stop].clone()
    with torch.no_grad():
        head[stop] *= 1.8
    yield model
    with torch.no_grad():
        head[stop] = old


def assert_same(found: list[str], wanted: list[str]) -> None:
    for prompt, one, other in zip(PROMPTS, found, wanted, strict=True):
        assert one == other, prompt


def test_answers_are_the_words_of_greedy_generation(talkative: Model) -> None:
    """Word for word, for prompts of many lengths at once; one token fewer makes other words."""
    wanted = [by_generate(talkative, prompt) for prompt in PROMPTS]
    lengths = {len(talkative.tokenizer.encode(text)) for text in wanted}
    assert len(lengths) > 1, "some answers must end before others"
    assert_same(answers(talkative, PROMPTS), wanted)
    with pytest.raises(AssertionError):
        assert_same(answers(talkative, PROMPTS), [by_generate(talkative, p, new_tokens=3) for p in PROMPTS])


def test_asking_together_or_alone_gives_the_same_answers(talkative: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither company, nor order, nor the size of a pass changes a word."""
    together = answers(talkative, PROMPTS)
    assert together == [answers(talkative, [prompt])[0] for prompt in PROMPTS]
    assert together == answers(talkative, PROMPTS[::-1])[::-1]
    assert [text for text in together for _ in range(2)] == answers(talkative, [p for p in PROMPTS for _ in range(2)])
    monkeypatch.setattr("editctl.engine.speak.ROWS", 1)
    assert together == answers(talkative, PROMPTS)


def test_a_sentence_end_within_the_wanted_answer_does_not_count(talkative: Model) -> None:
    """With `at_least`, words go on to that many tokens, so that "St. Louis" can be said."""
    short, long = answers(talkative, PROMPTS), answers(talkative, PROMPTS, [6] * len(PROMPTS))
    assert_same(long, [by_generate(talkative, prompt, at_least=6) for prompt in PROMPTS])
    assert short != long


def test_every_prompt_is_counted_once(model: Model) -> None:
    """The tick tells how many are done."""
    ticks: list[int] = []
    answers(model, PROMPTS, tick=ticks.append)
    assert sum(ticks) == len(PROMPTS)
    assert answers(model, []) == []


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(model: Model) -> None:
    """Cutting it would ask something else; the message shows it and what the model reads."""
    long = "The river and the road. " * 60 + "The capital of Norway is"
    assert len(model.encode(long)) > model.context_length
    with pytest.raises(InvalidInput, match=str(model.context_length)):
        answers(model, [PROMPTS[0], long])
    with pytest.raises(InvalidInput, match="edit oslo"):
        check_lengths(model, [("rome", PROMPTS[0], ()), ("oslo", long, ())])
    check_lengths(model, [("rome", PROMPTS[0], ("Oslo",))])
    with pytest.raises(InvalidInput, match="edit rome: a prompt and its answer of"):
        check_lengths(model, [("rome", PROMPTS[0], ("Oslo", long))])


# Teacher forcing


def forced(model: Model, pairs: list[tuple[str, str]]) -> list[tuple[float, float]]:
    return [(score.nll, score.accuracy) for score in scores(model, pairs)]


def probabilities(model: Model, pairs: list[tuple[str, str]]) -> list[float]:
    return [score.probability for score in scores(model, pairs)]


PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ("Oslo", "the city of London")]


def by_hand(model: Model, prompt: str, answer: str, shift: int = 0) -> tuple[float, float]:
    """Mean NLL and accuracy over the answer's tokens, one token at a time."""
    ids = model.tokenizer.encode(f"{prompt} {answer}")
    start = len(model.tokenizer.encode(prompt)) + shift
    losses, hits = [], []
    for place in range(start, len(ids)):
        with torch.no_grad():
            logits = model.net(input_ids=torch.tensor([ids[:place]])).logits[0, -1]
        losses.append(float(-logits.log_softmax(-1)[ids[place]]))
        hits.append(float(int(logits.argmax()) == ids[place]))
    return sum(losses) / len(losses), sum(hits) / len(hits)


def check(score: Callable[[str, str], tuple[float, float]], found: list[tuple[float, float]]) -> None:
    for pair, (nll, accuracy) in zip(PAIRS, found, strict=True):
        assert (nll, accuracy) == pytest.approx(score(*pair), rel=1e-4), pair


def test_forced_values_are_those_of_a_plain_loop(model: Model) -> None:
    """Mean NLL in nats and the share of tokens that come first; a window one token off gives others."""
    found = forced(model, PAIRS)
    check(lambda *pair: by_hand(model, *pair), found)
    with pytest.raises(AssertionError):
        check(lambda *pair: by_hand(model, *pair, shift=-1), found)


def test_what_the_model_says_is_what_it_is_forced_to_most_easily(talkative: Model) -> None:
    """The first words of a greedy answer have teacher-forced accuracy 1; other words have not."""
    for prompt, said in zip(PROMPTS, answers(talkative, PROMPTS), strict=True):
        whole = talkative.tokenizer.encode(join(prompt, said))
        with torch.no_grad():
            ids = torch.tensor([talkative.tokenizer.encode(prompt)])
            first = int(talkative.net(input_ids=ids).logits[0, -1].argmax())
        if whole[ids.shape[1] : ids.shape[1] + 1] == [first]:
            assert next_tokens(talkative, [prompt], 1)[0][0][0] == talkative.tokenizer.decode([first])
    assert all(accuracy < 1 for _, accuracy in forced(talkative, PAIRS))


def test_next_tokens_come_by_falling_probability(model: Model) -> None:
    """As many as asked for, and their probabilities are the softmax's."""
    tokens = next_tokens(model, PROMPTS[:1], 5)[0]
    assert len(tokens) == 5 and [p for _, p in tokens] == sorted((p for _, p in tokens), reverse=True)
    total = sum(p for _, p in next_tokens(model, PROMPTS[:1], model.net.config.vocab_size)[0])
    assert total == pytest.approx(1, abs=1e-4) and sum(p for _, p in tokens) < 0.999


def test_next_tokens_of_many_prompts_are_those_of_each_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their lengths and the size of a pass; another prompt has others."""
    together = next_tokens(model, PROMPTS, 4)
    for rows in (128, 2):
        monkeypatch.setattr("editctl.engine.speak.ROWS", rows)
        for prompt, found in zip(PROMPTS, next_tokens(model, PROMPTS[::-1], 4)[::-1], strict=True):
            alone = next_tokens(model, [prompt], 4)[0]
            assert [token for token, _ in found] == [token for token, _ in alone], prompt
            assert [p for _, p in found] == pytest.approx([p for _, p in alone], rel=1e-4)
    assert together[0] != together[1]
    assert next_tokens(model, [], 4) == [] and next_tokens(model, PROMPTS[:1], 0) == [[]]
    with pytest.raises(InvalidInput, match="leaves no room"):
        next_tokens(model, [PROMPTS[0], "The river and the road. " * 60], 4)


def product(model: Model, prompt: str, answer: str, shift: int = 0) -> float:
    """The product of the probabilities of the answer's tokens, one pass a token."""
    nll, _ = by_hand(model, prompt, answer, shift)
    tokens = len(model.tokenizer.encode(f"{prompt} {answer}")) - len(model.tokenizer.encode(prompt)) - shift
    return math.exp(-nll * tokens)


def test_the_probability_of_an_answer_is_the_product_of_those_of_its_tokens(model: Model) -> None:
    """Of one token and of several; a window one token off gives others, and so does the mean."""
    found = probabilities(model, PAIRS)
    assert found == pytest.approx([product(model, *pair) for pair in PAIRS], rel=1e-3, abs=0)
    for pair, one, (nll, _) in zip(PAIRS, found, forced(model, PAIRS), strict=True):
        if pair[0] != "Rome":  # nothing stands before the one token of it
            assert one != pytest.approx(product(model, *pair, shift=-1), rel=1e-3, abs=0), pair
        assert one != pytest.approx(math.exp(-nll), rel=1e-3, abs=0), pair


def test_the_probabilities_of_all_next_tokens_are_those_of_answers_of_one(model: Model) -> None:
    """The likeliest word that stands alone after its space, asked as an answer."""
    prompt = PROMPTS[0]
    size = model.net.config.vocab_size
    words = {token[1:]: p for token, p in next_tokens(model, [prompt], size)[0] if token[0] == " " < token[1:]}
    one = [w for w in words if len(model.encode(join(prompt, w))) == len(model.encode(prompt)) + 1][:5]
    assert len(one) == 5
    assert probabilities(model, [(prompt, w) for w in one]) == pytest.approx([words[w] for w in one], rel=1e-4, abs=0)


def test_a_space_at_the_prompts_end_is_the_one_before_the_answer(model: Model) -> None:
    """As `forced` takes it: the token that spans the seam is the answer's; two spaces are another text."""
    assert len(model.encode(f"{PROMPTS[0]} the")) == len(model.encode(PROMPTS[0])) + 1
    plain, spaced, twice = probabilities(model, [(PROMPTS[0] + " " * n, "the") for n in range(3)])
    assert plain == pytest.approx(spaced, rel=1e-4, abs=0) and plain != pytest.approx(twice, rel=1e-2, abs=0)


def test_the_probability_of_an_answer_too_long_to_read_is_refused(model: Model) -> None:
    """Instead of an error of the library; one that just fits is answered."""
    room = model.context_length - len(model.encode(PROMPTS[0]))
    long = " ".join(["a"] * room)
    assert len(model.encode(join(PROMPTS[0], long))) == model.context_length
    assert probabilities(model, [(PROMPTS[0], long)])[0] < 1
    with pytest.raises(InvalidInput, match=f"{model.context_length + 1} tokens are more than the"):
        probabilities(model, [(PROMPTS[0], "Oslo"), (PROMPTS[0], long + " a")])


def test_a_token_that_the_tokenizer_sets_behind_every_text_is_not_read(model: Model) -> None:
    """Words and scores are those without it; it would stand between a prompt and what follows."""
    plain_words, plain = answers(model, PROMPTS[:3]), scores(model, PAIRS[:4])
    end, encode = model.tokenizer.eos_token_id or 0, model.tokenizer

    class Ending:
        """The tokenizer, with one more token at the end of every text."""

        def __call__(self, text: str, add_special_tokens: bool = True, **more: Any) -> Any:
            found = encode(text, add_special_tokens=add_special_tokens, **more)
            if add_special_tokens:
                found["input_ids"] = [*found["input_ids"], end]
            return found

        def __len__(self) -> int:
            return len(encode)

        def __getattr__(self, name: str) -> Any:
            return getattr(encode, name)

    other = Model(model.net, Ending(), name="ending")
    assert other.tokenizer("Rome")["input_ids"][-1] == end != other.encode("Rome")[-1]
    assert answers(other, PROMPTS[:3]) == plain_words
    for found, wanted in zip(scores(other, PAIRS[:4]), plain, strict=True):
        assert found.losses == pytest.approx(wanted.losses, rel=1e-4)


def test_a_token_that_the_tokenizer_does_not_know_can_be_said(model: Model) -> None:
    """Heads are padded beyond the vocabulary, and a model that edits have broken says such tokens."""
    head = model.net.get_output_embeddings()
    padded = torch.nn.Linear(head.in_features, head.out_features + 8, bias=False)
    with torch.no_grad():
        padded.weight[: head.out_features] = head.weight
        padded.weight[head.out_features :] = 50 * head.weight[:8].abs().sum(0)
    inputs = model.net.get_input_embeddings()
    wide = torch.nn.Embedding(inputs.num_embeddings + 8, inputs.embedding_dim)
    model.net.set_output_embeddings(padded)
    model.net.set_input_embeddings(wide)
    try:
        assert len(answers(model, PROMPTS[:2])) == 2
    finally:
        model.net.set_output_embeddings(head)
        model.net.set_input_embeddings(inputs)
