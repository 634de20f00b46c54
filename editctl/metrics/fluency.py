"""Fluency: how much a model repeats itself when it writes freely.

Protocol `sampled`: texts as `engine.sampling` writes them, opening included; the entropy of their word pairs and
triples (Zhang et al. 2018; weighted as ROME's evaluation code does, Meng et al. 2022). Knows: what a word is, and the
formula. Refuses: models; it is given texts.

High is not good by itself: a model that writes words at random repeats itself least of all. A fall tells of loops;
whether what is written makes sense, perplexity and consistency tell.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from editctl.metrics.intervals import mean_interval
from editctl.metrics.values import Metric

SAMPLED = "sampled"
"""The protocol: seeded sampling, one text an opening."""
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Of the entropies of pairs and of triples; the value is the mean of the two weighted ones."""

_OPEN, _CLOSE = "``", "''"
_TOKEN = re.compile(
    r"\.{2,}|--|`+|''|[;@#$%&?!*\[\](){}<>\"\u2012-\u2015«“‘„»”’]|[:,](?!\d)"  # each a word of its own
    r"|(?:[^\s;@#$%&?!*\[\](){}<>\"\u2012-\u2015«“‘„»”’`:,.'-]|[:,](?=\d)|\.(?!\.)|-(?!-)|'(?!'))+"
)
_STOP = re.compile(r"(?<=[^\s.])\.(?=[\"'”’»)\]}>]*(\s+[\"'“‘«(\[]*(\S)|\s*$))")
"""A full stop that may end a sentence: white space follows, or nothing does; group 2 is how what follows begins."""
_CLITIC = re.compile(r"(?i)(.+?)(n't|'(?:s|m|d|ll|re|ve))$")
_FRONT = re.compile(r"(?i)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)")
_JOINED = {"cannot": 3, "gonna": 3, "gotta": 3, "gimme": 3, "lemme": 3, "wanna": 3, "d'ye": 1, "more'n": 4}
"""Words that are two, and where the second begins."""
_SHORT = re.compile(
    r"[^\W\d_]|mrs?|ms|dr|st|jr|sr|prof|gen|col|capt|lt|sgt|rev|hon|vs|vol|fig|mt|u\.s|u\.k|e\.g|i\.e", re.IGNORECASE
)
"""Initials and abbreviations, whose full stop ends no sentence."""


def words(text: str) -> list[str]:
    """The words and marks of a text, as nltk's `word_tokenize` finds them in English.

    Punctuation, brackets, quotes and dashes stand alone, clitics too ("does n't", "Ada 's"); numbers such as 1,000 or
    3.5, words such as "well-known" and abbreviations keep their marks. The difference: nltk takes a full stop off where
    its trained Punkt model ends a sentence; here one does when what follows begins with a capital or is nothing, and
    what precedes is neither an initial nor a common abbreviation.
    """
    found: list[str] = []
    for start, end in _sentences(text):
        for match in _TOKEN.finditer(text, start, end):
            found += _parts(text, match.group(), match.start())
        found += ["."] if text[end : end + 1] == "." else []
    return found


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Spans between full stops that end a sentence, the stops left out."""
    start = 0
    for match in _STOP.finditer(text):
        place = match.start()
        # No abbreviation is longer; a whole sentence looked at for each of its stops is quadratic.
        before = text[max(start, place - 20) : place].split()[-1:]
        word = before[0].lstrip("\"'“‘«([") if before else ""
        follows = match.group(2)
        if follows is None or (follows.isupper() and not _SHORT.fullmatch(word)):
            yield start, place
            start = place + 1
    yield start, len(text)


def _parts(text: str, token: str, place: int) -> list[str]:
    """One token as words: quotes told apart, clitics and joined words split."""
    if token == '"':
        return [_OPEN if place == 0 or text[place - 1] in " \n\t([{<" else _CLOSE]
    parts: list[str] = []
    if token != "''" and _FRONT.match(token):
        parts, token = ["'"], token[1:]
    tail: list[str] = []
    if len(token) > 1 and token.endswith("'") and token != "''":
        token, tail = token[:-1], ["'"]
    if match := _CLITIC.match(token):
        token, tail = match[1], [match[2], *tail]
    if at := _JOINED.get(token.casefold()):
        return [*parts, token[:at], token[at:], *tail]
    return [*parts, token, *tail]


def entropy(found: Sequence[str], n: int) -> float:
    """Entropy of the distribution of n neighbouring words, in bits; 0 when there are fewer than n + 1 words."""
    counts = Counter(zip(*(found[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def weighted(text: str) -> float:
    """(2/3 · H₂ + 4/3 · H₃) / 2 of a text, in hundredths of a bit, as the papers' tables have it.

    0 of a text of fewer than three words: a model that falls silent is not fluent.
    """
    found = words(text)
    return 100 * math.fsum(weight * entropy(found, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


def fluency(texts: Sequence[str | None]) -> Metric | None:
    """The mean over texts, with Student's interval; None without a text.

    Args:
        texts: a text that is None, since the model's probabilities were no numbers, makes the value none either (NaN).
    """
    if not texts:
        return None
    values = [math.nan if text is None else weighted(text) for text in texts]
    low, high = mean_interval(values)
    low = None if low is None else max(0.0, low)
    return Metric("fluency", SAMPLED, math.fsum(values) / len(values), len(values), low=low, high=high)
