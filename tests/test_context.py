"""IKE: the paper's demonstrations, the edit that a prompt is about, and what is really read in front of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional

from editctl.artifacts import KEY
from editctl.delta import Overlay, write_tensors
from editctl.engine import families, methods, speak
from editctl.engine.context import KIND, Contexts, cosine, demonstrations, share, weighing, write
from editctl.engine.lessons import Lesson
from editctl.engine.model import Model
from editctl.engine.prompts import Request
from editctl.engine.writing import Job
from editctl.errors import StoreError
from editctl.events import silent
from editctl.files import digest_of

LESSONS = tuple(
    Lesson(
        id=f"lesson {i}",
        subject=name,
        template="{} lives in the city of",
        prompt=f"{name} lives in the city of",
        target=place,
        old="Paris",
        rewordings=(f"The home of {name} is", f"If you want to visit {name}, go to"),
        stays=(
            (f"{name} was born in", "Rome"),
            ("The capital of Norway is", "Oslo"),
            (f"The friend of {name} is", "Ada"),
        ),
    )
    for i, (name, place) in enumerate(
        (name, place)
        for place in ("Rome", "London", "Oslo", "Warsaw")
        for name in ("Ada", "Marie", "Tom", "Eve", "Ann")
    )
)
REQUESTS = (
    Request("tower", "{} is located in the city of", "The Eiffel Tower", "Rome"),
    Request("ada", "In the summer, {}'s machine was moved to", "Ada Lovelace", "Berlin"),
    Request("rome", "{} was not built in", "Rome", "a year"),
)
ABOUT = ("You can see the Eiffel Tower from", "The machine of Ada Lovelace stood in", "Rome, they say, was burnt by")
"""Other prompts about the three subjects."""
FAR = ("What did the fox", "The quick brown fox ran over", "Oslo is the capital of")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one trained file of the lessons."""
    return a_library(tmp_path_factory.mktemp("artifacts"), [asdict(lesson) for lesson in LESSONS])


def a_library(folder: Path, lessons: Sequence[dict[str, Any]]) -> Path:
    draft = folder / "draft.part"
    write_tensors(draft, {"lessons": torch.ones(1)}, {KEY: {"method": "ike", "lessons": lessons}})
    draft.rename(folder / f"{digest_of(draft)}.safetensors")
    return folder


def an_overlay(model: Model, library: Path, requests: Sequence[Request] = REQUESTS, **own: Any) -> Overlay:
    settings = methods.settings({"num_hidden_layers": len(model.blocks)}, "ike", {"nearness": 0.5, **own})
    (file,) = library.glob("*.safetensors")
    job = Job(
        model=model,
        requests=requests,
        settings=replace(settings, artifact=file.stem),
        number=1,
        emit=silent,
        library=library,
        projector=lambda layer: None,
    )
    overlay = write(job).overlay
    assert overlay is not None
    return overlay


def by_hand(request: Request, shown: Sequence[str] = (), nearness: float = 0.5) -> Overlay:
    entry = {"id": request.id, "subject": request.subject, "prompt": request.prompt, "target": request.target}
    return Overlay(KIND, ({**entry, "demonstrations": list(shown)},), settings={"nearness": nearness})


def prefix(model: Model, overlay: Overlay, text: str) -> tuple[int, ...] | None:
    (found,) = Contexts(model, overlay, Path()).find([tuple(model.encode(text))])
    return None if found is None else found.prefix


def decoded(model: Model, ids: Sequence[int]) -> str:
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))


# ---------------------------------------------------------------------------------------------------------------------
# Demonstrations


def kind_of(text: str, lesson: Lesson) -> str:
    """Which kind a demonstration of a lesson is, by the paper's words for the three."""
    first, second, *rest = text.split("\n")
    assert rest == ["", ""] and first == f"New Fact: {lesson.prompt} {lesson.target}"
    said = second.removeprefix("Prompt: ")
    assert said != second
    if said == f"{lesson.prompt} {lesson.target}":
        return "copy"
    if said in [f"{text} {lesson.target}" for text in lesson.rewordings]:
        return "update"
    assert said in [f"{text} {answer}" for text, answer in lesson.stays]
    return "retain"


def of(text: str) -> Lesson:
    """The lesson that a demonstration is of."""
    return next(lesson for lesson in LESSONS if text.startswith(f"New Fact: {lesson.prompt} {lesson.target}\n"))


@pytest.mark.parametrize("most", [8, 16])
def test_demonstrations_have_the_published_form_and_ratio(most: int) -> None:
    """One copy to three updates to four that stay, word for word as in the paper; a lesson gives one."""
    made = demonstrations([asdict(lesson) for lesson in LESSONS], most)
    kinds = [kind_of(text, of(text)) for text in made]
    assert {kind: 8 * kinds.count(kind) // most for kind in kinds} == {"copy": 1, "update": 3, "retain": 4}
    assert len({of(text).id for text in made}) == most
    with pytest.raises(AssertionError):
        kind_of(made[0].replace("Rome", "Bern").replace("Oslo", "Bern"), of(made[0]))


def test_the_most_alike_lesson_stands_last() -> None:
    """The order given, the other way round."""
    lessons = [asdict(lesson) for lesson in LESSONS]
    made = demonstrations(lessons, 8)
    assert [of(text).id for text in made] == [f"lesson {i}" for i in reversed(range(8))]
    assert [of(text).id for text in demonstrations(lessons[::-1], 8)] == [f"lesson {i}" for i in range(12, 20)]


def test_a_lesson_that_lacks_a_kind_waits_for_its_own() -> None:
    """One with nothing that stays is an update; of nothing but such lessons the four that stay are missing."""
    bare = [asdict(replace(lesson, stays=())) for lesson in LESSONS]
    made = demonstrations([bare[0], *map(asdict, LESSONS[1:])], 8)
    kinds = [kind_of(text, of(text)) for text in made]
    assert sorted(kinds) == ["copy", *["retain"] * 4, *["update"] * 3]
    assert [kind for kind, text in zip(kinds, made, strict=True) if of(text).id == "lesson 0"] == ["update"]
    assert len(demonstrations(bare, 8)) == 4 and len(demonstrations(bare[:2], 8)) == 2 and not demonstrations([], 8)


def test_an_edit_is_given_the_lessons_most_like_it(model: Model, tmp_path: Path) -> None:
    """By the words of prompt and answer: of the same relation, those of the same answer last; of another relation,
    others."""
    strange = [
        asdict(replace(lesson, prompt=f"A machine of {lesson.id[-1]} was sold to the", target=place))
        for lesson, place in zip(LESSONS, ("fox", "river") * 10, strict=True)
    ]
    mixed = [*strange, *map(asdict, LESSONS)]
    random.Random(0).shuffle(mixed)
    library = a_library(tmp_path, mixed)
    request = Request("zoe", "{} lives in the city of", "Zoe", "Oslo")
    (entry,) = an_overlay(model, library, [request], demonstrations=16).entries
    shown = entry["demonstrations"]
    assert all("lives in the city of" in text.split("\n")[0] for text in shown)
    assert all(of(text).target == "Oslo" for text in shown[-5:])
    assert not any(of(text).target == "Oslo" for text in shown[:-5])
    (entry,) = an_overlay(model, library, [replace(request, template="A machine of {} was sold to the")]).entries
    assert not any("lives in the city of" in text.split("\n")[0] for text in entry["demonstrations"])


def test_what_an_edit_is_given_does_not_depend_on_others(model: Model, library: Path) -> None:
    """So an edit that goes leaves what never making it leaves; one of another answer is given other demonstrations."""
    whole = an_overlay(model, library)
    for gone in range(3):
        stay = [i for i in range(3) if i != gone]
        assert whole.only(stay).digest() == an_overlay(model, library, [REQUESTS[i] for i in stay]).digest()
    other = an_overlay(model, library, [replace(REQUESTS[0], target="London")])
    assert other.entries[0]["demonstrations"] != whole.entries[0]["demonstrations"]


def test_a_version_needs_its_trained_file_no_more(model: Model, library: Path, tmp_path: Path) -> None:
    """Demonstrations are kept as texts; writing without the file is refused."""
    overlay = an_overlay(model, library)
    assert overlay.artifact == "" and not overlay.tensors
    assert all(len(entry["demonstrations"]) == 16 for entry in overlay.entries)
    assert any(Contexts(model, overlay, tmp_path).hits([REQUESTS[0].prompt]))
    settings = replace(methods.settings({"num_hidden_layers": 4}, "ike", {}), artifact="0" * 32)
    job = Job(
        model=model,
        requests=REQUESTS,
        settings=settings,
        number=1,
        emit=silent,
        library=tmp_path,
        projector=lambda layer: None,
    )
    with pytest.raises(StoreError, match="missing"):
        write(job)


# ---------------------------------------------------------------------------------------------------------------------
# Likeness


def test_likeness_is_the_cosine_of_weighed_words_and_pairs() -> None:
    """Written out for two texts; without the pairs or the weights it is another number."""
    documents = ["the river runs", "the fox runs", "the fox sees the river"]
    one, other = "the river", "The river runs"
    weigh = weighing(documents)
    # idf: ln((1 + N) / (1 + n)) + 1, with N = 3
    idf = {1: torch.log(torch.tensor(2.0)) + 1, 2: torch.log(torch.tensor(4 / 3)) + 1, 3: torch.tensor(1.0)}
    first = torch.stack([idf[3], idf[2], idf[2], torch.tensor(0.0), torch.tensor(0.0)])
    second = torch.stack([idf[3], idf[2], idf[2], idf[2], idf[1]])
    wanted = float(functional.cosine_similarity(first, second, dim=0))
    assert cosine(weigh(one), weigh(other)) == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(float(functional.cosine_similarity(first[[0, 1]], second[[0, 1]], dim=0)), rel=1e-2)
    assert wanted != pytest.approx((3 / 5) ** 0.5, rel=1e-2)
    assert share(weigh(one), weigh(other)) == pytest.approx(1) and cosine(weigh(other), weigh(other)) == pytest.approx(
        1
    )
    assert share(weigh(other), weigh(one)) == pytest.approx(float(first.square().sum() / second.square().sum()))
    assert cosine(weigh("?"), weigh(one)) == 0 and share(weigh("?"), weigh(one)) == 0


def test_the_edit_is_found_whose_subject_a_text_names(model: Model, library: Path) -> None:
    """In another phrasing too, in another case, and by most of a longer name; a text in the very phrasing of an edit,
    but about another subject, is none's."""
    contexts = Contexts(model, an_overlay(model, library), Path())
    hits = contexts.hits([*(request.prompt for request in REQUESTS), *ABOUT])
    assert [hit and hit.edit for hit in hits] == ["tower", "ada", "rome"] * 2
    assert all(hit and hit.kind == "ike" and 0.5 < hit.score <= 1 for hit in hits)
    again = ("the river below ADA LOVELACE", "People say that Eiffel Tower, of the", "a road that leads to Rome was")
    assert [hit and hit.edit for hit in contexts.hits(again)] == ["ada", "tower", "rome"]
    other = [request.template.replace("{}", "Marie Curie") for request in REQUESTS]
    assert contexts.hits([*other, *FAR]) == [None] * 6


def test_of_two_edits_of_a_subject_the_more_alike_is_found(model: Model, library: Path) -> None:
    """By the rest of the prompt; of two of one prompt the later holds."""
    born = Request("born", "{} was born in", "Ada Lovelace", "Oslo")
    contexts = Contexts(model, an_overlay(model, library, [born, REQUESTS[1]]), Path())
    asked = ["When Ada Lovelace was born in", "That summer, Ada Lovelace's machine was"]
    assert [hit and hit.edit for hit in contexts.hits(asked)] == ["born", "ada"]
    twice = an_overlay(model, library, [born, replace(born, id="later", target="Rome")])
    assert [hit and hit.edit for hit in Contexts(model, twice, Path()).hits([born.prompt])] == ["later"]


def test_a_nearness_of_zero_always_finds_the_nearest(model: Model, library: Path) -> None:
    """Also for texts that name none, where half finds nothing; without entries there is none to find."""
    overlay = an_overlay(model, library, nearness=0.0)
    texts = [*FAR, "", "?!"] if model.tokenizer.bos_token_id is not None else [*FAR, "?!"]
    assert all(Contexts(model, overlay, Path()).hits(texts))
    assert Contexts(model, overlay.only([]), Path()).hits(texts) == [None] * len(texts)
    asked = ["A summer's machine, moved to", "Who was not built in"]
    assert [hit and hit.edit for hit in Contexts(model, overlay, Path()).hits(asked)] == ["ada", "rome"]


def test_a_subject_in_a_script_without_spaces_is_found(model: Model) -> None:
    """Where words cannot be told apart, it is the subject's own letters that are looked for."""
    contexts = Contexts(model, by_hand(Request("paris", "{}は", "パリ", "ローマ")), Path())
    named, other = contexts.hits(["フランスの首都パリは", "フランスの首都リヨンは"])
    assert named is not None and named.score == 1 and other is None


# ---------------------------------------------------------------------------------------------------------------------
# What is read


def test_the_context_is_demonstrations_edit_and_prompt(model: Model, library: Path) -> None:
    """Text for text, the start token first where the model has one, and the prompt's own ids behind it."""
    overlay = an_overlay(model, library, demonstrations=1)
    (shown,) = overlay.entries[0]["demonstrations"]
    found, own = prefix(model, overlay, ABOUT[0]), model.encode(ABOUT[0])
    assert found is not None
    start = model.tokenizer.bos_token_id
    if start is not None:
        assert found[0] == own[0] == start and start not in found[1:]
        own = own[1:]
    wanted = f"{shown}New Fact: The Eiffel Tower is located in the city of Rome\nPrompt: {ABOUT[0]}"
    assert decoded(model, [*found, *own]) == wanted
    (hit,) = Contexts(model, overlay, Path()).hits([ABOUT[0]])
    assert hit is not None and hit.sent.removeprefix(tiny.BOS) == wanted


def test_a_tokenizer_that_sets_the_space_itself_is_given_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sentencepiece does: between `Prompt:` and the prompt stands one space either way."""
    spaced = tiny.tokenizer(bos=model.tokenizer.bos_token_id is not None)
    spaced.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    monkeypatch.setattr(model, "tokenizer", spaced)
    overlay = by_hand(REQUESTS[0])
    found = prefix(model, overlay, ABOUT[0])
    assert found is not None
    contexts = Contexts(model, overlay, Path())
    assert contexts._gap == "" and not decoded(model, found).endswith(" ")
    whole = decoded(model, [*found, *contexts._own(model.encode(ABOUT[0]))])
    assert whole.lstrip().endswith(f"\nPrompt: {ABOUT[0]}")


def test_the_first_demonstrations_go_until_the_model_can_read_the_rest(model: Model, library: Path) -> None:
    """And an answer still fits; as many as possible stay. Where the bare edit is too long there is no hit."""
    overlay = an_overlay(model, library)
    shown, text = overlay.entries[0]["demonstrations"], ABOUT[0]
    bare = "New Fact: The Eiffel Tower is located in the city of Rome\nPrompt:"
    own = len(Contexts(model, overlay, Path())._own(model.encode(text)))
    kept = []
    for length in (1000, 300, 200, 128):
        small = _reading(model, length)
        found = prefix(small, overlay, text)
        assert found is not None and len(found) + own + speak.NEW_TOKENS <= length
        kept.append(next(n for n in range(17) if decoded(model, found).strip() == "".join([*shown[16 - n :], bare])))
        if kept[-1] < 16:
            more = model.encode("".join([*shown[15 - kept[-1] :], bare]) + " ")
            assert len(more) + own + speak.NEW_TOKENS > length
    assert kept[0] == 16 and kept == sorted(kept, reverse=True) and kept[-1] < kept[1]
    least = len(model.encode(f"{bare} ")) + own + speak.NEW_TOKENS
    assert prefix(_reading(model, least), overlay, text) is not None
    assert prefix(_reading(model, least - 1), overlay, text) is None


class _Short(Model):
    """A model that reads so many tokens."""

    length = 0

    @property
    def context_length(self) -> int:
        return self.length


def _reading(model: Model, length: int) -> Model:
    made = object.__new__(_Short)
    vars(made).update(vars(model))
    made.length = length
    return made


def read_plainly(model: Model, ids: Sequence[int], count: int) -> Tensor:
    """Logits at the last positions of one text."""
    return model.net(torch.tensor([ids]), use_cache=False).logits[0, -count:]


def test_a_prompt_is_read_behind_its_context_and_all_others_as_they_are(model: Model, library: Path) -> None:
    """In one batch: rows about an edit have the logits of the whole text, the others their own bits."""
    overlay = an_overlay(model, library, demonstrations=2)
    about, far = model.encode(ABOUT[1]), model.encode(" ".join((*FAR, *FAR)))
    texts = [about, far[: len(about)], [*about[:-1], about[-2]], [*far[:1], *far[2 : len(about) + 1]]]
    contexts = Contexts(model, overlay, Path())
    found = contexts.find([tuple(ids) for ids in texts])
    assert [one and one.edit for one in found] == ["ada", None, "ada", None]
    plain = model.net(torch.tensor(texts), use_cache=False).logits
    with families.laid(model, [overlay], Path()):
        mixed = model.net(torch.tensor(texts), use_cache=False).logits
    for i, (ids, one) in enumerate(zip(texts, found, strict=True)):
        assert torch.equal(mixed[i], plain[i]) == (one is None)
        if one is not None:
            own = contexts._own(ids)
            whole = read_plainly(model, [*one.prefix, *own], len(own))
            assert torch.allclose(mixed[i, -len(own) :], whole, atol=1e-4)


def test_answers_are_those_behind_the_context(model: Model, library: Path) -> None:
    """Greedy words and scores, token by token from a cache; without the context they are others."""
    overlay = an_overlay(model, library, demonstrations=1)
    asks = [speak.Ask(text, ("London by night",)) for text in (*ABOUT, *FAR)]
    plain = speak.hear(model, asks)
    contexts = Contexts(model, overlay, Path())
    with families.laid(model, [overlay], Path()):
        heard = speak.hear(model, asks)
    assert heard[3:] == plain[3:] and all(one != other for one, other in zip(heard[:3], plain, strict=False))
    for text, one in zip(ABOUT, heard, strict=False):
        (found,) = contexts.find([tuple(model.encode(text))])
        assert found is not None
        ids = [*found.prefix, *contexts._own(model.encode(text))]
        tail = model.encode(f"{text} London by night")[len(model.encode(text)) :]
        logits = read_plainly(model, [*ids, *tail[:-1]], len(tail))
        losses = functional.cross_entropy(logits, torch.tensor(tail), reduction="none").tolist()
        assert one.scores[0].losses == pytest.approx(losses, abs=1e-4)


def test_a_text_that_outgrows_the_model_is_read_from_its_end(model: Model) -> None:
    """Rather than failing; a text that does not is read whole."""
    contexts = Contexts(model, by_hand(REQUESTS[0]), Path())
    ids = torch.tensor([[5 + i % 50 for i in range(model.context_length + 9)]] * 2)
    with contexts.on():
        long = contexts.read(ids, 3)
        fitting = contexts.read(ids[:, 9:], 3)
    assert torch.equal(long, fitting)
    assert torch.allclose(fitting[0], read_plainly(model, ids[0, 9:].tolist(), 3), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# A model that reads contexts
