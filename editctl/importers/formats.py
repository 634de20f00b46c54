"""The formats of benchmarks: how a record of each is told, and what its fields mean.

Knows: the fields of CounterFact (original and flat), zsRE, KnowEdit, MQuAKE, LEME, WikiBigEdit, RippleEdits, PEAK,
QAEdit and known_1000, and where each goes. Refuses: files, and what a spec can hold; `draft` says that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editctl import spec
from editctl.importers.draft import Asked, Draft, Path, Piece, Refused, among, flat, relation, said
from editctl.importers.names import ALT
from editctl.spec import Edit

_REWRITE = "requested_rewrite"


@dataclass(frozen=True)
class Reading:
    """The edits of one record, and what it asks of them together."""

    drafts: tuple[Draft, ...]
    shared: Draft | None = None


@dataclass(frozen=True)
class Format:
    """One benchmark's records."""

    name: str
    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Draft, str], None] | None = None
    """Fills the draft of a record that is one edit; the text says which target zsRE's edits aim at."""
    merges: bool = False
    """Whether a record is several edits, and equal edits of several records are one."""

    def reading(self, record: int, value: Mapping[str, Any], target: str) -> Reading:
        """What a record says.

        Raises:
            Refused: it is no record of this format.
        """
        if self.merges:
            return _mquake(record, value)
        draft = Draft(Piece(record, dict(value)))
        draft.tags.append(self.name)
        assert self.read is not None
        self.read(draft, target)
        return Reading((draft,))


def _rewritten(draft: Draft) -> None:
    """The fact of `requested_rewrite`, as CounterFact, MQuAKE and PEAK have it."""
    new, true = ((_REWRITE, name, "str") for name in ("target_new", "target_true"))
    draft.fact((_REWRITE, "subject"), (_REWRITE, "prompt"), new, true, template=True)
    _relation_of(draft, draft.text(_REWRITE, "relation_id"))


def _counterfact(draft: Draft, _target: str) -> None:
    _rewritten(draft)
    draft.reworded("paraphrase_prompts")
    true = (draft.target_true,) if draft.target_true else ()
    draft.locality += [Asked(text, true) for text in draft.texts("neighborhood_prompts")]
    draft.home(("neighborhood_prompts",), lambda edit, value: among(value, edit.locality_prompts))
    draft.written("generation_prompts")


def _flat(draft: Draft, _target: str) -> None:
    draft.fact(("subject",), ("prompt",), ("target_new",), ("ground_truth",))
    _reworded(draft, "rephrase_prompt")
    draft.asked("locality", ("locality_prompt",), ("locality_ground_truth",))


def _wikibigedit(draft: Draft, _target: str) -> None:
    if "update" not in draft.piece.rest:
        _flat(draft, "")
        return
    draft.fact(("subject",), ("update",), ("ans",))
    _reworded(draft, "rephrase")
    _reworded(draft, "personas")
    draft.asked("locality", ("loc",), ("loc_ans",))
    draft.asked("portability", ("mhop",), ("mhop_ans",), "multi-hop")


def _zsre(draft: Draft, target: str) -> None:
    draft.aim = target
    answers = [text.strip() for text in draft.texts("answers")]
    first: Path = ("answers", 0) if isinstance(draft.value(("answers",)), list) else ("answers",)
    if target == ALT:
        draft.fact(("subject",), ("src",), ("alt",), first if answers else ())
        if draft.target_new and draft.target_new in answers:
            raise Refused("no change", f"the target {spec.quoted(draft.target_new)} is among the true answers")
        # asked and answered as if `alt` were so
        asks, says = (("portability", f"New {what}") for what in ("Question", "Answer"))
        draft.asked("portability", asks, says, "one hop")
    else:
        if not answers:
            raise Refused("field missing", "answers holds no text")
        draft.fact(("subject",), ("src",), first)
    draft.home(("answers",), lambda edit, value: value in ([edit.target_true], [edit.target_new]))
    draft.reworded("rephrase")
    draft.asked("locality", ("loc",), ("loc_ans",))


_AXES = {"subject_aliasing": "alias", "reasoning": "reasoning", "logical_generalization": "logical generalization"}
_AXES |= {
    "relation_specificity": "relation specificity",
    "forgetfulness": "forgetfulness",
    "compositionality_i": "compositionality I",
}
_AXES |= {"compositionality_ii": "compositionality II"}


def _knowedit(draft: Draft, _target: str) -> None:
    rest = draft.piece.rest
    if "labels" in rest:
        draft.fact(("concept",), ("text",), ("labels",))
    else:
        truths = flat(rest.get("ground_truth"))
        # EasyEdit's filler for "no old answer given"
        known = [text for text in truths if not re.fullmatch(r"\s*(<\|endoftext\|>)?\s*", text)]
        draft.fact(("subject",), ("prompt",), ("target_new",))
        draft.target_true = known[0].strip() if known else ""
        draft.home(("ground_truth",), lambda edit, value: edit.target_true in (value, *_only(value)) and bool(known))
    for name in ("rephrase", "rephrase_prompt"):
        draft.reworded(name)
    for where in ("locality", "portability"):
        axes = rest.get(where)
        if axes is not None and not isinstance(axes, dict):
            draft.aside("field of another type", f"{where} is no object of axes")
        for axis, tests in axes.items() if isinstance(axes, dict) else ():
            _axis(draft, where, axis, tests)


def _only(value: Any) -> Sequence[Any]:
    """The text of a list that holds one text and no more, however deep."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return (value,) if isinstance(value, str) else ()


def _axis(draft: Draft, where: str, axis: str, tests: Any) -> None:
    """The probes of one axis, as a list of probes or as a list of prompts and one of answers."""
    kind = _AXES.get(axis.casefold().replace(" ", "_"), axis)
    at: Path = (where, axis)
    if isinstance(tests, dict):
        prompts, answers = (tests.get(name) for name in ("prompt", "ground_truth"))
        if prompts is None:
            return
        if isinstance(prompts, str):
            draft.asked(where, (*at, "prompt"), (*at, "ground_truth"), kind)
            return
        if not (isinstance(prompts, list) and isinstance(answers, list) and len(prompts) == len(answers)):
            draft.aside("field of another type", f"{where} {spec.visible(axis)} has not one answer for each prompt")
            return
        for position in range(len(prompts)):
            draft.probe(where, (*at, "prompt", position), (*at, "ground_truth", position), kind)
        pairs = [(prompt, tuple(flat(answer))) for prompt, answer in zip(prompts, answers, strict=True)]
        plain = all(isinstance(prompt, str) for prompt in prompts) and all(map(_plain, answers))
        for name in ("prompt", "ground_truth"):
            draft.home((*at, name), lambda edit, _: plain and among(pairs, said(edit, where)))
        return
    for path, test in draft.items(*at):
        if isinstance(test, dict):
            draft.asked(where, (*path, "prompt"), (*path, "ground_truth"), kind)
        else:
            draft.aside("field of another type", f"{where} {spec.visible(axis)} holds more than objects")


def _plain(answer: Any) -> bool:
    return isinstance(answer, str) or (isinstance(answer, list) and all(isinstance(text, str) for text in answer))


def _qaedit(draft: Draft, _target: str) -> None:
    draft.fact(("subject",), ("prompt",), ("target",))
    draft.reworded("rephrase")
    _tag(draft, draft.text("source"))
    for path, probe in draft.items("locality"):
        if isinstance(probe, dict):
            draft.asked("locality", (*path, "loc"), (*path, "loc_ans"))
        else:
            draft.aside("field of another type", "locality holds more than objects")


def _peak(draft: Draft, _target: str) -> None:
    _rewritten(draft)
    draft.reworded("para_add_prompts")
    pairs = []
    for path, pair in draft.items("neighborhood_prompts"):
        if isinstance(pair, list) and len(pair) == 2:
            draft.probe("locality", (*path, 0), (*path, 1))
            pairs.append((pair[0], (pair[1],)))
        else:
            draft.aside("field of another type", "neighborhood_prompts holds more than pairs of prompt and answer")
    told = [[prompt, answer] for prompt, (answer,) in pairs]
    draft.home(("neighborhood_prompts",), lambda edit, value: value == told and among(pairs, said(edit, "locality")))


def _known(draft: Draft, _target: str) -> None:
    """The prompt goes on behind the template where the fact is asked for with more words."""
    subject, template = draft.need("subject"), draft.need("template")
    relation, prompt = template.strip(), draft.text("prompt").strip()
    asked = spec.fill(relation, subject.strip())
    if relation.count(spec.SLOT) == 1 and spec.SLOT not in prompt and prompt.startswith(asked):
        relation += prompt[len(asked) :]
    draft.fact(("subject",), ("template",), ("attribute",), template=True)
    draft.relation = relation
    draft.home(("prompt",), lambda edit, value: edit.prompt == value)
    _relation_of(draft, draft.text("relation_id"))


def _leme(draft: Draft, target: str) -> None:
    (_counterfact if _REWRITE in draft.piece.rest else _zsre)(draft, target)
    name = next((name for name in _COUPLED if name in draft.piece.rest), _COUPLED[0])
    opening = draft.text(name, "subject_entity", "coupled_prompt")
    related = draft.text(name, "coupled_entities", 0, "entity")
    if opening:
        tie = f"\n-relationship to {related}" if related else ""
        # the long-form opening of the benchmark's own code; 600 new tokens follow it
        draft.generation.append(f"{opening.strip()}{tie}\n\n{draft.subject}")


def aims(value: Any) -> bool:
    """Whether a record of LEME is zsRE's, whose edit may aim at either target."""
    return isinstance(value, dict) and "src" in value and _REWRITE not in value


_COUPLED = ("coupled_prompts_and_properties", "dependancies")
_TAILS = ("is associated with is", "is a member of is", "is the capital of is", "is part of is", "plays in is")
_ENDS = (*_TAILS, "won is", "has is", "is followed by", "follows", "is", "are")
"""What stands between subject and target, in RippleEdits' prompts."""
_STARTS = {"name", "names", "number", "of", "which", "by", "in", "city", "mother", "tongue", "members", "siblings"}
_STARTS |= {"the", "award", "country", "place", "date", "held", "position", "sports", "league", "gender", "children"}
"""Words before the subject there; those of the relations' own names come beside these."""
_RIPPLE = dict.fromkeys(
    ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing"), "portability"
)
_RIPPLE |= dict.fromkeys(("Relation_Specificity", "Forgetfulness"), "locality")


def _ripple(draft: Draft, _target: str) -> None:
    """The edit is one sentence, out of which subject and target are cut by what other sentences share with it."""
    old = next((name for name in ("original_fact", "previous_fact") if draft.value(("edit", name))), "original_fact")
    sentence, former = draft.need("edit", "prompt").strip(), draft.text("edit", old, "prompt").strip()
    prompt, draft.subject = _ripple_prompt(draft, sentence, former)
    draft.relation = relation(prompt, draft.subject)
    draft.target_new = _without_stop(sentence[len(prompt) :])
    draft.target_true = _without_stop(former[len(prompt) :])
    draft.home(("edit", "prompt"), lambda edit, value: f"{edit.prompt} {edit.target_new}." == value)
    draft.home(("edit", old, "prompt"), lambda edit, value: f"{edit.prompt} {edit.target_true}." == value)
    _relation_of(draft, draft.text("edit", "relation"))
    for axis, where in _RIPPLE.items():
        for path, test in draft.items(axis):
            queries = draft.items(*path, "test_queries") if isinstance(test, dict) else []
            if not queries or not all(isinstance(query, dict) for _, query in queries):
                draft.aside("field of another type", f"{axis} holds more than tests of queries")
                continue
            # one of several that are all to be answered counts by itself
            one = where == "portability" and len(queries) > 1 and test.get("test_condition") != "AND"
            group = f"{axis.lower()}-{path[1]}" if one else ""
            for at, query in queries:
                said = [(answer.get("value"), answer.get("aliases")) for answer in _objects(query.get("answers"))]
                made = Asked(draft.text(*at, "prompt"), list(flat([*map(list, said)])), _AXES[axis.lower()], group)
                getattr(draft, where).append(made)
                draft.home((*at, "prompt"), _prompted(draft, where, made))


def _prompted(draft: Draft, where: str, made: Asked) -> Callable[[Edit, Any], bool]:
    return lambda edit, value: draft.alone(where, made) and value in getattr(edit, f"{where}_prompts")


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _ripple_prompt(draft: Draft, sentence: str, former: str) -> tuple[str, str]:
    """The sentence up to its target, and its subject, which no field names.

    Raises:
        Refused: the record does not tell one of them.
    """
    own = draft.value(("edit", "subject_id"))
    queries = [
        query
        for axis in _RIPPLE
        if axis != "Subject_Aliasing"
        for test in _objects(draft.value((axis,)))
        for name in ("test_queries", "condition_queries")
        for query in _objects(test.get(name))
        if query.get("query_type") == "regular" and query.get("subject_id") == own
    ]
    named = [draft.piece.rest["edit"], *queries]
    words = {word.lower() for one in named for word in re.findall("[A-Za-z]+", str(one.get("relation")))} | _STARTS
    others = [_head(str(query.get("prompt"))) for query in queries]
    shown = spec.quoted(sentence, 200)
    ways: dict[str, tuple[int, str]] = {}
    spans: list[tuple[int, int]] = []
    for end in _ENDS:
        for match in re.finditer(f" {end}(?= )", sentence):
            # of two ends the shorter may be part of the longer
            inner = any(start <= match.start() and match.end() <= stop for start, stop in spans)
            head, prompt = sentence[: match.start()], sentence[: match.end()]
            if inner or (former and not former.startswith(prompt + " ")):
                continue
            spans.append(match.span())
            alike = [other for other in others if other.split()[-1:] == head.split()[-1:]]
            ways[head] = len(alike), prompt
    best = max((count for count, _ in ways.values()), default=-1)
    chosen = [head for head, (count, _) in ways.items() if count == best]
    if len(chosen) != 1:
        raise Refused("target unknown", f"nobody can tell where the target begins: {shown}")
    head, prompt = chosen[0], ways[chosen[0]][1]
    parts = _common_end([head, *(other for other in others if other.split()[-1:] == head.split()[-1:])])
    if parts == head.split(" "):
        parts = parts[parts[0] == "The" :]
    while parts and parts[0].islower() and parts[0] in words:
        parts = parts[1:]
    subject = " ".join(parts)
    if not subject or subject.islower() or len(spec.mentions(subject, prompt)) != 1:
        raise Refused("subject unknown", f"the prompts do not tell the subject: {shown}")
    return prompt, subject


def _head(prompt: str) -> str:
    """The prompt up to the end of its subject."""
    return next((prompt[: -1 - len(end)] for end in _ENDS if prompt.endswith(f" {end}")), "")


def _common_end(texts: Sequence[str]) -> list[str]:
    """The words of the longest end that all texts have."""
    words = [text.split(" ") for text in texts]
    count = 0
    while count < min(map(len, words)) and len({one[-1 - count] for one in words}) == 1:
        count += 1
    return words[0][len(words[0]) - count :]


def _without_stop(text: str) -> str:
    text = text.strip()
    return text[:-1].strip() if text.endswith(".") else text


def _mquake(record: int, value: Mapping[str, Any]) -> Reading:
    """All edits of a record; its questions are asked when the last of them is written."""
    rewrites = value.get(_REWRITE)
    if not isinstance(rewrites, list) or not rewrites:
        raise Refused("field missing", f"{_REWRITE} is no list of edits")
    case = {name: value[name] for name in ("case_id",) if name in value}
    drafts = []
    for rewrite in rewrites:
        draft = Draft(Piece(record, {**case, _REWRITE: rewrite}))
        _rewritten(draft)
        _reworded(draft, _REWRITE, "question")
        draft.tags.insert(0, "mquake")
        drafts.append(draft)
    shared = Draft(Piece(record, {name: item for name, item in value.items() if name != _REWRITE}))
    answers = [*shared.texts("new_answer"), *shared.texts("new_answer_alias"), *shared.texts("answer_extended")]
    name = f"mquake-{spec.visible(str(case.get('case_id', record)), 60)}"
    for question in shared.texts("questions"):
        shared.portability.append(Asked(question, answers, "multi-hop", name))
    shared.home(("questions",), lambda edit, value: among(value, edit.portability_prompts))
    for path, hop in shared.items("new_single_hops"):
        if not isinstance(hop, dict):
            shared.aside("field of another type", "new_single_hops holds more than objects")
            continue
        asked = [shared.text(*path, name).strip() for name in ("question", "cloze")]
        own = [draft for draft in drafts if {spec.fill(draft.relation, draft.subject), *draft.paraphrases} & set(asked)]
        wanted = [*shared.texts(*path, "answer"), *shared.texts(*path, "answer_alias")]
        if asked[0]:
            (own[0] if own else shared).portability.append(Asked(asked[0], wanted, "single hop"))
    return Reading(tuple(drafts), shared)


def _reworded(draft: Draft, *path: str | int) -> None:
    """A paraphrase, unless it is no more than the words before one."""
    if any(re.fullmatch(r"\s*Reformulated Question:\s*", text) for text in flat(draft.value(path))):
        draft.aside("no question", f"{path[-1]} is the bare text before a question")
    elif draft.value(path) is not None:
        draft.reworded(*path)


def _relation_of(draft: Draft, name: str) -> None:
    draft.relation_id = name
    _tag(draft, name)


def _tag(draft: Draft, text: str) -> None:
    if re.fullmatch(r"[\w.-]{1,60}", text):
        draft.tags.append(text)


def _has(value: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(value.get(name), str) for name in names)


def _rewrite(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get(_REWRITE), dict)


def _is_coupled(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in _COUPLED)


def _is_peak(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in ("postive_list", "negtive_list", "para_add_prompts"))


def _is_flat(value: Mapping[str, Any]) -> bool:
    told = all(not isinstance(value.get(name), dict | list) for name in ("locality", "portability"))
    return _has(value, "prompt", "subject", "target_new") and told


FORMATS = {
    made.name: made
    for made in (
        Format("counterfact", lambda v: _rewrite(v) and not _is_peak(v) and not _is_coupled(v), _counterfact),
        Format(
            "counterfact-flat",
            lambda v: _is_flat(v) and ("ground_truth" in v or not _has(v, "rephrase_prompt")),
            _flat,
        ),
        Format("zsre", lambda v: _has(v, "subject", "src") and not _is_coupled(v), _zsre),
        Format(
            "knowedit",
            lambda v: (
                _has(v, "text", "labels", "concept")
                or (_has(v, "prompt", "subject", "target_new") and (not _is_flat(v) or not _has(v, "rephrase_prompt")))
            ),
            _knowedit,
        ),
        Format("mquake", lambda v: isinstance(v.get(_REWRITE), list), merges=True),
        Format("leme", _is_coupled, _leme),
        Format(
            "wikibigedit",
            lambda v: (
                _has(v, "subject", "update", "ans")
                or (_is_flat(v) and _has(v, "rephrase_prompt") and "ground_truth" not in v)
            ),
            _wikibigedit,
        ),
        Format("ripple", lambda v: isinstance(v.get("edit"), dict) and "subject_id" in v["edit"], _ripple),
        Format("peak", lambda v: _rewrite(v) and _is_peak(v), _peak),
        Format("qaedit", lambda v: _has(v, "prompt", "subject", "target"), _qaedit),
        Format("known", lambda v: _has(v, "subject", "attribute", "template"), _known),
    )
}
"""All formats by name."""


def detect(value: Mapping[str, Any]) -> list[str]:
    """The formats that a record may be of."""
    return [name for name, made in FORMATS.items() if made.fits(value)]
