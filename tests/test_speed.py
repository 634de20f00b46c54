"""How much faster asking everything together is than asking as the published evaluations do."""

from __future__ import annotations

import random
import time

import pytest
import torch

from editctl.engine.asking import ask_all
from editctl.engine.model import Model, load
from editctl.engine.prompts import join
from editctl.engine.speak import NEW_TOKENS
from editctl.events import silent
from editctl.metrics.edits import Question, questions
from editctl.spec import Probe
from editctl.studies import sequential

RECORDS, APART = 100, 12
"""Records asked together, and how many of them one after the other: those take a minute."""


def one_by_one(model: Model, asked: list[Question]) -> dict[Question, str]:
    """As EasyEdit and ROME's evaluation: a pass for each target of each prompt, then the words, a prompt at a time."""
    said = {}
    with torch.no_grad():
        for question in asked:
            for answer in (*question.wanted[:1], question.rival):
                if answer:
                    ids = torch.tensor([model.encode(join(question.prompt, answer))])
                    model.net(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            ids = torch.tensor([model.encode(question.prompt)])
            whole = model.net.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=model.tokenizer.convert_tokens_to_ids("."),
                pad_token_id=0,
            )
            said[question] = model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return said


@pytest.mark.timing
def test_asking_together_is_eight_times_as_fast_as_record_by_record() -> None:
    """Of records with ten neighbours each, on the built-in model; both say the same. A second run is made only
    where a busy machine slowed the first: it slows small passes and large ones unlike."""
    model = load("atlas", device="cpu")
    made, kept = sequential.make(RECORDS, 300, 0)
    pool, rng = [q for some in kept.values() for q in some], random.Random(0)
    probes = {edit.id: tuple(Probe(prompt=q.prompt, answer=q.wanted) for q in rng.sample(pool, 10)) for edit in made}
    asked = [q for edit in made for q in questions(edit.model_copy(update={"locality": probes[edit.id]}))]
    ask_all(model, asked[:50], "before", silent)
    few = [q for q in asked if q.edit in {edit.id for edit in made[:APART]}]
    ratios = []
    for _ in range(2):
        begun = time.perf_counter()
        together = ask_all(model, asked, "before", silent)
        middle = time.perf_counter()
        apart = one_by_one(model, few)
        ended = time.perf_counter()
        ratios.append((ended - middle) / len(few) / ((middle - begun) / len(asked)))
        same = sum(apart[q].split(".")[0].strip() == together.words[q] for q in few)
        assert same > 0.98 * len(few), f"{same} of {len(few)}"
        if ratios[-1] >= 8:
            break
    told = " and ".join(f"{ratio:.1f}" for ratio in ratios)
    print(f"{len(asked)} prompts of {RECORDS} records: {told} times as fast as one after the other")
    assert max(ratios) >= 8
