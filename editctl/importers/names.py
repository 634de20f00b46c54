"""The names of the formats that can be imported, without what reads them.

Knows: names, other names, and what each is. Refuses: everything else, so that the command line starts fast.
"""

from __future__ import annotations

NAMES = {
    "counterfact": "CounterFact or multi_counterfact, as ROME and MEMIT have them",
    "counterfact-flat": "CounterFact as EasyEdit has it: one paraphrase and one neighbour an edit",
    "zsre": "zsRE as MEND has it",
    "knowedit": "KnowEdit: wiki_recent, wiki_counterfact, ZsRE, WikiBio; or requests as EasyEdit has them",
    "mquake": "MQuAKE: several edits a record, and questions about all of them",
    "leme": "LEME: CounterFact or zsRE with essays about the subject",
    "wikibigedit": "WikiBigEdit, with its own names of fields or EasyEdit's",
    "ripple": "RippleEdits",
    "peak": "PEAK: edits that add an answer",
    "qaedit": "QAEdit",
    "known": "known_1000: facts that GPT-2 XL knows",
}
"""What each format is, by name."""
ALIASES = {
    "multi_counterfact": "counterfact",
    "multi-counterfact": "counterfact",
    "counterfact_flat": "counterfact-flat",
    "rippleedits": "ripple",
    "known_1000": "known",
}
"""Other names of formats."""
TARGETS = {
    "alt": "the counterfactual alt, as EasyEdit's do",
    "answers": "the first true answer, as ROME's, MEMIT's and AlphaEdit's do",
}
"""What zsRE's edits may aim at, and whose experiments do."""
ALT = "alt"
WITH_TARGET = ("zsre", "leme")
"""The formats whose edits may aim at the one or the other."""


def name_of(text: str) -> str:
    """The format that a text names; empty if it names none."""
    name = text.casefold()
    name = ALIASES.get(name, name)
    return name if name in NAMES else ""
