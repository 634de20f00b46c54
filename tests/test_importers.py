"""Importers: every benchmark's fields have a home or stay under `extra`; what is no edit is told; nothing is lost."""

import json
import os
import random
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editctl import amend, spec
from editctl.cli import cli
from editctl.errors import InvalidInput
from editctl.importers import counterfact, stream
from editctl.importers.draft import relation, slotted
from editctl.importers.formats import FORMATS, detect
from editctl.importers.names import ALIASES, NAMES, name_of
from editctl.importers.work import Importer
from editctl.spec import Edit, Probe

ROOT = Path(__file__).parents[1]
SAMPLES = Path(os.environ.get("EDITCTL_SAMPLES", ROOT / "../shared/data"))
FILE = Path("bench.json")
sampled = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of real data sets are not here")
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test has a folder of its own."""
    monkeypatch.chdir(tmp_path)


def imported(data, form="", out="specs.toml", **options):
    """What becomes of records, or of a text or bytes: edits as read back from the files, rows told, the survey."""
    if isinstance(data, Path):
        path = data
    else:
        path = FILE
        raw = data if isinstance(data, bytes | str) else json.dumps(data)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    rows = []
    importer = Importer(path, form, **options)
    survey = importer.look(rows.append)
    if not survey.edits:
        return [], rows, survey
    files = importer.write(Path(out), rows.append)
    report = spec.check([file for file, _ in files])
    assert report.problems == ()
    assert len(report.edits) == survey.edits == sum(count for _, count in files)
    return list(report.edits), rows, survey


def texts(value):
    """The leaves of a JSON value that say something, as texts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value if isinstance(value, str) else json.dumps(value)]


def held(edit):
    """Every text that an edit holds: its fields, its prompts filled, and the leaves of `extra`."""
    found = {edit.subject, edit.relation, edit.prompt, edit.target_new, edit.target_true, *edit.tags}
    found |= {*edit.paraphrase_prompts, *edit.locality_prompts, *edit.portability_prompts, *edit.generation_prompts}
    found |= {answer for probe in (*edit.locality, *edit.portability) for answer in probe.answer}
    # RippleEdits: a sentence with target and full stop
    found |= {f"{edit.prompt} {target}." for target in (edit.target_new, edit.target_true)}
    return found | set(texts(json.loads(edit.extra or "{}")))


def lost(record, edits):
    """The leaves of a record that no edit holds."""
    found = set().union(*map(held, edits)) if edits else set()
    return [text for text in texts(record) if text not in found]


# ---------------------------------------------------------------------------------------------------------------------
# The samples

EVERY = {
    "counterfact/counterfact_300.json": ("counterfact", 300, 300, {}, {"asks for what changes": 4, "repeated": 1}),
    "counterfact/flat_1000.json": (
        "counterfact-flat",
        1000,
        1000,
        {},
        {"asks for what changes": 2, "repeated": 2},
    ),
    "zsre/zsre_portability_400.json": ("zsre", 400, 390, {"no change": 10}, {"hidden character": 2}),
    "zsre/zsre_train_200.json": ("zsre", 200, 194, {"no change": 4, "empty: target": 2}, {}),
    "mquake/mquake_cf_100.json": ("mquake", 100, 259, {}, {}),
    "knowedit/wiki_counterfact_100.json": ("knowedit", 100, 100, {}, {"asks for what changes": 6, "repeated": 3}),
    "knowedit/wikibio_60.json": ("knowedit", 60, 60, {}, {}),
    "knowedit/zsre_100.json": ("knowedit", 100, 100, {}, {}),
    "known/known_300.json": ("known", 300, 300, {}, {}),
    "wikibigedit/wikibigedit_300.json": ("wikibigedit", 300, 300, {}, {"no question": 2}),
    "qaedit/qaedit_100.json": ("qaedit", 100, 99, {"subject twice": 1}, {}),
    "peak/peak_100.json": ("peak", 100, 100, {}, {}),
    "ripple/ripple_sample.json": ("ripple", 1, 1, {}, {}),
    "malformed/control_wellformed.json": ("counterfact", 3, 3, {}, {}),
    "malformed/crlf.json": ("counterfact", 3, 3, {}, {}),
    "malformed/bom.json": ("counterfact", 3, 3, {}, {}),
    "malformed/subject_absent.json": ("counterfact", 3, 2, {"subject absent": 1}, {}),
    "malformed/subject_absent_flat.json": (
        "counterfact-flat",
        4,
        1,
        {"subject absent": 1, "subject in other letters": 1, "empty: subject": 1},
        {},
    ),
    "malformed/brace_in_paraphrase.json": ("counterfact", 3, 3, {}, {}),
    "malformed/empty_target.json": ("counterfact", 3, 1, {"empty: target": 2}, {}),
    "malformed/conflicting_targets.json": ("counterfact", 5, 2, {"conflict": 2, "repeated": 1}, {}),
    "malformed/long_target.json": ("counterfact", 3, 1, {"too long: target": 2}, {}),
    "malformed/object_single_record.json": ("counterfact", 1, 1, {}, {}),
    "malformed/object_keyed.json": ("counterfact", 3, 3, {}, {}),
    "malformed/ansi_and_markup_subject.json": ("counterfact", 5, 3, {"hidden character: subject": 2}, {}),
    "malformed/control_characters.json": (
        "counterfact",
        5,
        0,
        {"hidden character: subject": 4, "hidden character: target": 1},
        {},
    ),
    "malformed/control_characters_raw.json": (
        "counterfact",
        3,
        0,
        {"hidden character: subject": 2, "hidden character: target": 1},
        {},
    ),
}
"""By file: format, records, edits, records refused and things kept aside, each by reason."""
NONE = {
    "malformed/truncated.json": "truncated.json:76: not valid JSON: Unterminated string starting at (column 7)",
    "leme/annotations_50.csv": 'no JSON list or object of records; it begins with "content,sample_id,ex"',
    "leme/README.md": "no JSON list or object of records",
    "facts/lre/city_in_country.json": "is of no known format: its records have name, prompt_templates",
    "facts/pararel/patterns/P19.jsonl": "is of no known format: its records have pattern",
    "text/tinystories_1000.json": "is of no known format: it holds no objects",
    "text/wikitext2_valid.txt": "no JSON list or object of records",
    "tokenizers/gpt2/encoder.json": "is of no known format",
    "tokenizers/neox/20B_tokenizer.json": "is of no known format: its records have version",
    "models/stories260k/config.json": "is of no known format: its records have",
    "models/stories260k/model.safetensors": "not UTF-8 text: byte 0xf8",
}
"""Files that are none of a benchmark's, and what is said of them."""


@sampled
@pytest.mark.parametrize("name", EVERY)
def test_every_sample_is_imported_with_exact_counts_and_loses_nothing(name):
    """The format is detected; every record is in an edit or told; every leaf of an imported record is in the specs."""
    form, count, edits, refused, asides = EVERY[name]
    path = SAMPLES / name
    found, rows, survey = imported(path)
    assert Importer(path).format.name == form
    assert (survey.records, survey.edits, dict(survey.refused), dict(survey.asides)) == (count, edits, refused, asides)
    assert len(found) == edits
    data = [record.value for record in stream.records(path, lambda value: "requested_rewrite" in value)]
    told = {row.record for row in rows if not row.aside}
    assert len(told) == sum(refused.values())
    whole = {at: lost(one, from_record(at, found)) for at, one in enumerate(data, 1) if at not in told}
    assert {at: texts for at, texts in whole.items() if texts} == {}


def from_record(number, edits):
    """The edits that a record had a part in; where only the first records are named, it may have had one."""
    named = ((edit, re.search(r", records? ([\d, ]*\d)(, …)?", edit.source)) for edit in edits)
    return [edit for edit, match in named if match[2] or str(number) in match[1].split(", ")]


@sampled
@pytest.mark.parametrize("name", NONE)
def test_files_that_are_no_benchmarks_are_refused_with_the_reason(name):
    """As an error of input, with a remedy; nothing is written."""
    with pytest.raises(InvalidInput) as caught:
        imported(SAMPLES / name)
    error = caught.value
    assert NONE[name] in " ".join([error.message, *map(str, error.problems)])
    assert error.hint
    assert list(Path().iterdir()) == []


@sampled
def test_every_sample_file_is_in_one_of_the_two_lists():
    """So that none is forgotten; of folders with many files of one kind, one stands for all."""
    alike = re.compile(r"(facts/.*|text/tinyshakespeare.txt|tokenizers/.*|models/.*|README.md)")
    names = {path.relative_to(SAMPLES).as_posix() for path in SAMPLES.rglob("*") if path.is_file()}
    assert {name for name in names - EVERY.keys() - NONE.keys() if not alike.fullmatch(name)} == set()


@sampled
def test_the_look_for_lost_leaves_finds_one():
    """Control: an edit without its `extra`, or without a probe, does not hold its record."""
    [first, *_] = json.loads((SAMPLES / "counterfact/counterfact_300.json").read_text())
    [edit], _, _ = imported([first])
    assert lost(first, [edit]) == []
    assert lost(first, [edit.model_copy(update={"extra": ""})])
    assert lost(first, [edit.model_copy(update={"locality": edit.locality[1:]})])


@sampled
@pytest.mark.parametrize("name", ["counterfact/counterfact_300.json", "malformed/brace_in_paraphrase.json"])
def test_what_is_exported_is_what_was_imported(name):
    """Every record of CounterFact's original schema, as JSON values."""
    found, _, _ = imported(SAMPLES / name)
    counterfact.write(found, Path("back.json"))
    assert json.loads(Path("back.json").read_text()) == json.loads((SAMPLES / name).read_text())


@sampled
def test_the_table_on_the_page_has_the_counts():
    """docs/importers.md says of every sample format what was counted here."""
    page = (ROOT / "docs/importers.md").read_text()
    for name, (form, records, edits, refused, asides) in EVERY.items():
        told = ", ".join(f"{number} {reason}" for reason, number in refused.items()) or "–"
        aside = ", ".join(f"{number} {reason}" for reason, number in asides.items()) or "–"
        assert f"| `{Path(name).name}` | {form} | {records:,} | {edits:,} | {told} | {aside} |" in page


# ---------------------------------------------------------------------------------------------------------------------
# Each format's fields, in a record of every shape that is known


def cf(subject="Danielle Darrieux", prompt="The mother tongue of {} is", new="English", **more):
    """A record of CounterFact's original schema."""
    rewrite = {"prompt": prompt, "relation_id": "P103", "subject": subject}
    rewrite |= {"target_new": {"str": new, "id": "Q1860"}, "target_true": {"str": "French", "id": "Q150"}}
    return {
        "case_id": 0,
        "pararel_idx": 2796,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [f"Shayna does this. {subject}, a native", f"{subject} spoke the language"],
        "neighborhood_prompts": ["The mother tongue of Léon Blum is", "The native language of Montesquieu is"],
        "attribute_prompts": ["J.R.R. Tolkien, a native"],
        "generation_prompts": [f"{subject}'s mother tongue is", f"{subject} was born in", f"{subject} was born in"],
        **more,
    }


def flat(subject="Autonomous University of Madrid", prompt="{}, which is located in", new="Sweden", **more):
    return {
        "case_id": 4,
        "prompt": prompt.replace("{}", subject),
        "target_new": new,
        "subject": subject,
        "ground_truth": "Spain",
        "rephrase_prompt": f"{subject}, in",
        "locality_prompt": "Ripoll, in",
        "locality_ground_truth": "Spain",
        **more,
    }


def zsre(**more):
    return {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": " University of Michigan",
        "answers": ["Illinois Institute of Technology", "IIT"],
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
        "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
        "portability": {
            "Recalled Relation": "(University of Michigan, city, Ann Arbor)",
            "New Question": "In which city did Watts Humphrey study?",
            "New Answer": "Ann Arbor",
        },
        **more,
    }


def knowedit(**more):
    return {
        "subject": "Leonardo DiCaprio",
        "prompt": "The name of the country of citizenship of Leonardo DiCaprio is",
        "target_new": "Syria",
        "ground_truth": ["United States"],
        "rephrase": "Leonardo DiCaprio is a citizen of",
        "portability": {
            "Subject_Aliasing": [{"prompt": "Leo is a citizen of", "ground_truth": [["Syria", "SYR"]]}],
            "Reasoning": [{"prompt": "The currency of his country is", "ground_truth": [["pound", "SYP"], ["lira"]]}],
            "Odd": [{"prompt": "What?", "ground_truth": "that"}],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The mother of Leonardo DiCaprio is", "ground_truth": [["Irmelin"]]},
                {"prompt": "The father of Leonardo DiCaprio is", "ground_truth": []},
            ],
            "Forgetfulness": None,
        },
        **more,
    }


BIO = {
    "text": "This is a Wikipedia passage about ann bishop. Ann Bishop was a biologist. ",
    "labels": "She was born in Manchester.",
    "concept": "ann bishop",
    "locality": {"Relation_Specificity": [{"prompt": "ann bishop sex or gender", "ground_truth": ["female"]}]},
}
BIG = {
    "tag": "update",
    "subject": "Ponte Vecchio",
    "update": "What crosses Ponte Vecchio?",
    "ans": "Via Por",
    "rephrase": "What goes over Ponte Vecchio?",
    "personas": "Ahoy, what be crossing Ponte Vecchio?",
    "mhop": "Where does what crosses Ponte Vecchio end?",
    "mhop_ans": "Florence",
    "loc": "What crosses Ponte Milvio?",
    "loc_ans": "Via Flaminia",
    "none": None,
}
PEAK = cf() | {
    "requested_rewrite": {
        "prompt": "{} shares border with",
        "relation_id": "re_P47",
        "target_new": {"str": "Chad"},
        "target_true": {"str": "Iran"},
        "subject": "Turkey",
    },
    "postive_list": ["Iran", "Iraq"],
    "negtive_list": ["Chad"],
    "negtive_random_list": ["Craig"],
    "para_add_prompts": ["Turkey is adjacent to"],
    "neighborhood_prompts": [["Vasif is a citizen of", "Iraq"], ["Vasif is a citizen of", "Iran"]],
}
for _key in ("attribute_prompts", "generation_prompts", "paraphrase_prompts", "pararel_idx"):
    del PEAK[_key]
QA = {
    "id": 7,
    "source": "NQ",
    "prompt": "who sings whats going on with the world",
    "target": " 4 Non Blondes",
    "subject": "whats going on",
    "rephrase": "Which band performs it?",
    "locality": [{"loc": "who won in 2018", "loc_ans": "Ozuna"}, {"loc": "where is it", "loc_ans": "here"}],
}
KNOWN = {
    "known_id": 3,
    "subject": "Vinson Massif",
    "attribute": "Antarctica",
    "template": "{} is located in the continent",
    "prediction": " of Antarctica. It is the highest",
    "prompt": "Vinson Massif is located in the continent of",
    "relation_id": "P30",
}
LEME = cf() | {
    "id": "d41d8cd98f00b204e9800998ecf8427e",
    "coupled_prompts_and_properties": {
        "subject_entity": {
            "entity": "Danielle Darrieux",
            "coupled_prompt": "Write an essay about Danielle Darrieux.\nInclude the following information:\n- spouse",
            "ground_truth": {"spouse": ["Henri Decoin", "Porfirio Rubirosa"], "award": []},
        },
        "coupled_entities": [{"entity": "Henri Decoin", "coupled_prompt": "Write …", "ground_truth": {}}],
    },
}


def mquake(case=1, **more):
    def rewrite(subject, prompt, new, true, question):
        made = {"prompt": prompt, "relation_id": prompt[:9], "subject": subject, "question": question}
        return made | {"target_new": {"str": new, "id": "Q1"}, "target_true": {"str": true, "id": "Q2"}}

    return {
        "case_id": case,
        "requested_rewrite": [
            rewrite("Misery", "{} was written by", "Rowling", "King", "Who wrote Misery?"),
            rewrite("Rowling", "{} is a citizen of", "Chad", "Britain", "Of which country is Rowling a citizen?"),
        ],
        "questions": [f"Of where is the author of Misery a citizen ({case}, {at})?" for at in range(3)],
        "answer": "United States",
        "answer_alias": ["US"],
        "new_answer": "Chad",
        "new_answer_alias": ["Tchad", "\U0001f1f9\U0001f1e9"],
        "new_single_hops": [
            {
                "question": "Who wrote Misery?",
                "cloze": "Misery was written by",
                "answer": "Rowling",
                "answer_alias": [],
            },
            {
                "question": "Where is the capital?",
                "cloze": "It is",
                "answer": "N'Djamena",
                "answer_alias": ["Ndjamena"],
            },
        ],
        "orig": {"triples": [["Q1", "P50", "Q2"]]},
        **more,
    }


def query(prompt, *answers, subject="Q38111", relation="MOTHER", kind="regular"):
    said = [{"value": value, "aliases": list(aliases)} for value, *aliases in answers]
    return {"prompt": prompt, "answers": said, "query_type": kind, "subject_id": subject, "relation": relation}


def ripple(edit="The name of the country of citizenship of Leo DiCaprio is Syria.", old=None, **more):
    about = {"subject_id": "Q38111", "relation": "COUNTRY_OF_CITIZENSHIP"}
    old = old or "The name of the country of citizenship of Leo DiCaprio is United States of America."
    mother = query("The name of the mother of Leo DiCaprio is", ("Irmelin", "Irma"))
    coin = query(
        "The name of the currency in the country of citizenship of Leo DiCaprio is", ("pound",), kind="two_hop"
    )
    son = query("The name of the child of Syria is", ("Leo DiCaprio",), subject="Q858", relation="CHILD")
    return {
        "example_type": "popular",
        "edit": {"prompt": edit, **about, "original_fact": {"prompt": old, **about}},
        "Logical_Generalization": [{"test_queries": [son, coin], "test_condition": "OR", "condition_queries": []}],
        "Compositionality_I": [{"test_queries": [coin, son], "test_condition": "AND", "condition_queries": []}],
        "Subject_Aliasing": [],
        "Relation_Specificity": [{"test_queries": [mother], "test_condition": "OR", "condition_queries": [mother]}],
        **more,
    }


VALID = {
    "counterfact": cf(),
    "counterfact-flat": flat(),
    "zsre": zsre(),
    "knowedit": knowedit(),
    "mquake": mquake(),
    "leme": LEME,
    "wikibigedit": BIG,
    "ripple": ripple(),
    "peak": PEAK,
    "qaedit": QA,
    "known": KNOWN,
}


@pytest.mark.parametrize("form", VALID)
def test_a_record_of_each_format_is_detected_imported_and_whole(form):
    """By its fields alone; and each leaf of it is in the specs."""
    assert detect(VALID[form]) == [form]
    found, rows, survey = imported([VALID[form]])
    assert found
    assert lost(VALID[form], found) == []
    assert not [row for row in rows if not row.aside]
    assert survey.records == 1
    assert [edit.to_json() for edit in imported([VALID[form]], form)[0]] == [edit.to_json() for edit in found]


def one(record, form="", **options):
    """The one edit of a record, and what stayed aside."""
    found, rows, _ = imported([record], form, **options)
    assert len(found) == 1
    return found[0], [row.reason for row in rows]


def test_counterfact_fills_every_field():
    """Paraphrases, neighbours with the true answer, openings; attribute prompts and numbers under `extra`."""
    edit, asides = one(cf())
    assert asides == []
    assert (edit.subject, edit.relation) == ("Danielle Darrieux", "The mother tongue of {} is")
    assert (edit.target_new, edit.target_true) == ("English", "French")
    assert edit.paraphrases == ("Shayna does this. {}, a native", "{} spoke the language")
    assert edit.locality[0] == Probe(prompt="The mother tongue of Léon Blum is", answer=("French",))
    assert edit.generation == ("{}'s mother tongue is", "{} was born in", "{} was born in")
    assert edit.tags == ("counterfact", "P103")
    assert edit.source == "bench.json, record 1 (case 0)"
    assert json.loads(edit.extra) == {
        "attribute_prompts": ["J.R.R. Tolkien, a native"],
        "case_id": 0,
        "pararel_idx": 2796,
        "requested_rewrite": {"relation_id": "P103", "target_new": {"id": "Q1860"}, "target_true": {"id": "Q150"}},
    }


def test_zsre_aims_at_the_target_that_is_named():
    """The counterfactual one with its one-hop question, or the true one without, for that assumes the other."""
    edit, _ = one(zsre())
    assert (edit.relation, edit.target_new) == ("What university did {} attend?", "University of Michigan")
    assert edit.target_true == "Illinois Institute of Technology"
    assert edit.portability == (Probe(prompt="In which city did {} study?", answer=("Ann Arbor",), kind="one hop"),)
    assert edit.locality == (
        Probe(prompt="nq question: who played desmond doss father in hacksaw ridge", answer=("Hugo Weaving",)),
    )
    assert json.loads(edit.extra)["alt"] == " University of Michigan"
    assert edit.source.endswith("target alt")
    true, _ = one(zsre(), target="answers")
    assert (true.target_new, true.target_true, true.portability) == ("Illinois Institute of Technology", "", ())
    assert json.loads(true.extra)["portability"] == zsre()["portability"]
    assert true.source.endswith("target answers")


def test_zsre_that_changes_nothing_or_says_nothing_is_refused():
    """A target among the true answers under `alt`, no answer under `answers`."""
    assert imported([zsre(alt="IIT")])[2].refused == {"no change": 1}
    assert one(zsre(alt="IIT"), target="answers")[0].target_new == "Illinois Institute of Technology"
    assert imported([zsre(answers=[])], target="answers")[2].refused == {"field missing": 1}


def test_knowedit_keeps_every_alias_and_names_the_axes():
    """Nested lists become accepted answers; where the nesting says more, it stays under `extra` as well."""
    edit, asides = one(knowedit())
    assert edit.target_true == "United States"
    assert edit.paraphrases == ("{} is a citizen of",)
    assert [(probe.prompt, probe.answer, probe.kind) for probe in edit.portability] == [
        ("Leo is a citizen of", ("Syria", "SYR"), "alias"),
        ("The currency of his country is", ("pound", "SYP", "lira"), "reasoning"),
        ("What?", ("that",), "Odd"),
    ]
    assert [(probe.prompt, probe.answer) for probe in edit.locality] == [
        ("The mother of {} is", ("Irmelin",)),
        ("The father of {} is", ()),
    ]
    assert asides == []
    left = json.loads(edit.extra)
    assert left["portability"] == {"Reasoning": [{"ground_truth": [["pound", "SYP"], ["lira"]]}]}
    assert left["locality"]["Forgetfulness"] is None


def test_one_prompt_with_several_right_answers_is_one_probe():
    """Of one kind; what became one stays under `extra` as it stood, and a probe that adds nothing is told."""
    asked = [{"prompt": "He works as", "ground_truth": [[text]]} for text in ("writer", "novelist", "writer")]
    alone = {"prompt": "His father is", "ground_truth": [["Bo"]]}
    edit, asides = one(knowedit(portability={"Reasoning": [*asked, alone], "Subject_Aliasing": asked[1:2]}))
    assert [(probe.prompt, probe.answer, probe.kind) for probe in edit.portability] == [
        ("He works as", ("writer", "novelist"), "reasoning"),
        ("His father is", ("Bo",), "reasoning"),
        ("He works as", ("novelist",), "alias"),
    ]
    assert asides == ["repeated"]
    assert json.loads(edit.extra)["portability"] == {"Reasoning": [*asked, {}]}


@sampled
def test_knowedits_occupations_are_one_probe():
    """Record 100 of the sample asks one prompt thrice, each time with another answer."""
    record = json.loads((SAMPLES / "knowedit/wiki_counterfact_100.json").read_text())[99]
    probes = one(record)[0].portability
    assert len({(probe.prompt, probe.kind) for probe in probes}) == len(probes)
    assert any({"writer", "novelist", "screenwriter"} <= set(probe.answer) for probe in probes)


def test_knowedits_biographies_end_in_a_sentence():
    """The passage is the prompt, without the space it ends in, and the sentence the target."""
    edit, _ = one(BIO)
    assert edit.relation == "This is a Wikipedia passage about {}. Ann Bishop was a biologist."
    assert edit.target_new == "She was born in Manchester."
    assert edit.locality == (Probe(prompt="{} sex or gender", answer=("female",), kind="relation specificity"),)


def test_easyedits_requests_are_knowedit_too():
    """Columns of prompts and answers; its filler is no answer; columns of unequal length stay aside."""
    record = {"prompt": "Leo is of", "target_new": "Syria", "ground_truth": "<|endoftext|>", "subject": "Leo"}
    record |= {
        "portability": {"reasoning": {"prompt": ["A", "B"], "ground_truth": ["a", "b"]}},
        "locality": {"x": {"prompt": ["C"], "ground_truth": []}, "y": {"prompt": None, "ground_truth": None}},
    }
    edit, asides = one(record)
    assert edit.target_true == ""
    assert [(probe.prompt, probe.answer) for probe in edit.portability] == [("A", ("a",)), ("B", ("b",))]
    assert asides == ["field of another type"]
    assert json.loads(edit.extra) == {"ground_truth": "<|endoftext|>", "locality": record["locality"]}


def test_mquakes_questions_wait_for_the_last_edit_of_their_record():
    """All edits of a record; the three wordings are one group; hops go to the edit they ask for."""
    first, second = imported([mquake()])[0]
    assert first.paraphrases == ("Who wrote {}?",)
    assert first.portability == (Probe(prompt="Who wrote {}?", answer=("Rowling",), kind="single hop"),)
    answers = ("Chad", "Tchad", "\U0001f1f9\U0001f1e9")
    asked = [probe for probe in second.portability if probe.kind == "multi-hop"]
    assert [(probe.answer, probe.group) for probe in asked] == [(answers, "mquake-1")] * 3
    assert (
        Probe(prompt="Where is the capital?", answer=("N'Djamena", "Ndjamena"), kind="single hop") in second.portability
    )


def test_mquakes_equal_edits_are_one_and_keep_what_every_record_asks():
    """Its home is the last new edit, or the last of all; sources and leftovers of all records stay."""
    other = mquake(2)
    other["requested_rewrite"][1]["target_new"]["str"] = "Chad"
    found, _, survey = imported([mquake(), other])
    assert (survey.edits, survey.merged) == (2, 2)
    groups = Counter(probe.group for probe in found[1].portability if probe.group)
    assert groups == {"mquake-1": 3, "mquake-2": 3}
    assert found[1].source == "bench.json, records 1, 2"
    assert [left["case_id"] for left in json.loads(found[1].extra)["records"]] == [1, 2]


def test_a_mquake_record_is_imported_as_a_whole_or_not_at_all():
    """One edit that contradicts an earlier record takes the others with it: its questions assume all."""
    other = mquake(2)
    other["requested_rewrite"][0] = other["requested_rewrite"][0] | {"subject": "Emma", "question": "Who wrote Emma?"}
    other["requested_rewrite"][1]["target_new"]["str"] = "Peru"
    found, rows, survey = imported([mquake(), other])
    assert survey.refused == {"conflict": 1}
    assert [edit.subject for edit in found] == ["Misery", "Rowling"]
    assert rows[0].record == 2


def test_what_many_records_ask_of_one_edit_stays_within_what_a_spec_takes():
    """A question goes to another edit of its record when the last has no room, and aside when none has."""
    found, rows, survey = imported([mquake(case) for case in range(150)])
    assert survey.edits == 2
    assert all(len(edit.portability) <= spec.MAX_ITEMS for edit in found)
    assert survey.asides == {"too many": 1}
    assert min(len(edit.portability) for edit in found) > 140
    assert lost([mquake(case) for case in range(150)], found) == []
    assert [row.reason for row in rows] == ["too many"]


def test_wikibigedits_own_fields():
    """Rewordings, the multi-hop question, the locality question; null stays null."""
    edit, _ = one(BIG)
    assert edit.paraphrases == ("What goes over {}?", "Ahoy, what be crossing {}?")
    assert edit.portability[0].kind == "multi-hop"
    assert json.loads(edit.extra) == {"none": None, "tag": "update"}


def test_wikibigedits_bare_rephrase_is_no_question():
    """The words before a question that never came stay aside."""
    record = flat(rephrase_prompt="Reformulated Question:")
    del record["ground_truth"]
    assert detect(record) == ["wikibigedit"]
    edit, asides = one(record)
    assert (edit.paraphrases, asides) == ((), ["no question"])


def test_peaks_neighbours_have_answers_of_their_own():
    """Two answers to one prompt are one probe; lists of objects stay under `extra`."""
    edit, _ = one(PEAK)
    assert edit.locality == (Probe(prompt="Vasif is a citizen of", answer=("Iraq", "Iran")),)
    assert json.loads(edit.extra)["postive_list"] == ["Iran", "Iraq"]


def test_qaedit_and_known_facts():
    """Targets lose the space around them; a prompt that goes on behind its template is the relation."""
    edit, _ = one(QA)
    assert (edit.relation, edit.target_new) == ("who sings {} with the world", "4 Non Blondes")
    assert edit.tags == ("qaedit", "NQ")
    edit, _ = one(KNOWN)
    assert (edit.relation, edit.target_new) == ("{} is located in the continent of", "Antarctica")
    assert json.loads(edit.extra)["template"] == "{} is located in the continent"


def test_leme_opens_essays_as_its_own_code_does():
    """The coupled prompt, the tie to the related entity, the subject; also on zsRE's records and in the older form."""
    edit, _ = one(LEME)
    wanted = "Write an essay about {}.\nInclude the following information:\n- spouse\n-relationship to Henri Decoin\n\n"
    assert edit.generation[-1] == wanted + "Danielle Darrieux"
    assert edit.generation_prompts[:3] == tuple(cf()["generation_prompts"])
    older = zsre(dependancies=LEME["coupled_prompts_and_properties"])
    edit, _ = one(older, target="alt")
    assert detect(older) == ["leme"]
    assert edit.generation[-1].endswith("\n\nWatts Humphrey") or edit.generation[-1].endswith("\n\n{}")
    assert edit.target_new == "University of Michigan"


def test_leme_has_a_target_to_choose_on_zsres_records_alone():
    """On CounterFact's nothing is announced and --target is refused; among both each edit says its own."""
    older = zsre(dependancies=LEME["coupled_prompts_and_properties"])
    edit, _ = one(LEME)
    assert "target" not in edit.source
    assert Importer(FILE).target == ""
    for form in ("", "leme"):
        with pytest.raises(InvalidInput, match="leme on CounterFact's records"):
            Importer(FILE, form, target="alt")
    first, second = imported([LEME, older], target="answers")[0]
    assert "target" not in first.source
    assert second.source.endswith(", target answers")
    assert second.target_new == "Illinois Institute of Technology"
    assert Importer(FILE, limit=1).target == ""


def test_lemes_mirrored_opening_stays_aside():
    """It is about the related entity, not about the subject."""
    edit, _ = one(LEME)
    [related] = LEME["coupled_prompts_and_properties"]["coupled_entities"]
    assert json.loads(edit.extra)["coupled_prompts_and_properties"]["coupled_entities"] == [related]
    assert related["coupled_prompt"] not in " ".join(edit.generation)


def test_ripple_edits_are_cut_where_the_record_tells():
    """Subject and targets out of sentences; one of several queries counts under OR, each under AND."""
    edit, _ = one(ripple())
    assert edit.relation == "The name of the country of citizenship of {} is"
    assert (edit.subject, edit.target_new, edit.target_true) == ("Leo DiCaprio", "Syria", "United States of America")
    mother = Probe(prompt="The name of the mother of {} is", answer=("Irmelin", "Irma"), kind="relation specificity")
    assert edit.locality == (mother,)
    assert [(probe.kind, probe.group) for probe in edit.portability] == [
        ("logical generalization", "logical_generalization-0"),
        ("logical generalization", "logical_generalization-0"),
        ("compositionality I", ""),
        ("compositionality I", ""),
    ]


@pytest.mark.parametrize(
    ("sentence", "relation", "others", "subject", "prompt", "target"),
    [
        (
            "The name of the country which Prize of Rome is associated with is Chad.",
            "COUNTRY",
            [],
            "Prize of Rome",
            7,
            "",
        ),
        ("The number of children Ada Lovelace has is 3.", "NUMBER_OF_CHILDREN", [], "Ada Lovelace", 5, "3"),
        ("The place of birth of Ada is Washington, D.C..", "PLACE_OF_BIRTH", [], "Ada", 6, "Washington, D.C."),
        ("Queen of Spain follows Emma of Rome.", "FOLLOWS", [], "Queen of Spain", 4, "Emma of Rome"),
        ("The mother tongue of This is Spain is Basque.", "NATIVE_LANGUAGE", ["This is Spain"], "This is Spain", 7, ""),
        ("The name of the father of The Who is Bo.", "FATHER", ["The Who"], "The Who", 8, "Bo"),
    ],
)
def test_ripple_subjects_of_every_kind_of_sentence(sentence, relation, others, subject, prompt, target):
    """With and without other sentences about the subject, and names that hold the words around names."""
    tests = (
        [{"test_queries": [query(f"The name of the sister of {name} is", ("x",)) for name in others]}] if others else []
    )
    record = ripple(sentence, sentence.replace(sentence.split()[-1], "Old."), Relation_Specificity=tests)
    record["edit"]["relation"] = relation
    edit, _ = one(record)
    assert edit.subject == subject
    assert target in edit.target_new
    assert f"{edit.prompt} {edit.target_new}." == sentence


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("Who?", "target unknown"),
        ("The name of the mother of This is Spain is Emma.", "target unknown"),
        ("The name of the mother of is Emma.", "subject unknown"),
        ("The gender of bitcoin is none.", "subject unknown"),
    ],
)
def test_a_ripple_sentence_that_may_be_cut_in_two_ways_is_refused(sentence, reason):
    """Never a guess: a wrong subject would write the edit at a wrong word."""
    record = ripple(sentence, sentence, Relation_Specificity=[])
    del record["edit"]["original_fact"]
    assert imported([record])[2].refused == {reason: 1}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what stays aside


@pytest.mark.parametrize(
    ("prompt", "subject", "made"),
    [
        ("Who is Ada?", "Ada", "Who is {}?"),
        ("Adam knew Ada", "Ada", "Adam knew {}"),
        ("Who is Ada? ", "Ada", "Who is {}?"),
        ("在巴黎的", "巴黎", "在{}的"),
        ("Who is {0}?", "{0}", "Who is {}?"),
        ("Who is Ada (1815)?", "Ada (1815)", "Who is {}?"),
    ],
)
def test_a_prompt_becomes_a_relation_at_the_one_place_of_its_subject(prompt, subject, made):
    """In whole words; what else it says stays, braces too."""
    assert relation(prompt, subject) == made
    assert made.replace("{}", subject) == prompt.strip() == slotted(prompt, subject).replace("{}", subject)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"subject": "Ada"}, "subject absent"),
        ({"subject": "autonomous university of madrid"}, "subject in other letters"),
        ({"subject": "Auto"}, "subject within a word"),
        ({"prompt": "Autonomous University of Madrid, Autonomous University of Madrid"}, "subject twice"),
        ({"prompt": "{} of Autonomous University of Madrid"}, "holds {}"),
        ({"prompt": "{} is"}, "holds {}"),
        ({"prompt": ""}, "empty: prompt"),
        ({"subject": " "}, "empty: subject"),
        ({"subject": None}, "field missing"),
        ({"subject": ["a"]}, "field of another type"),
        ({"target_new": "\u3000"}, "empty: target"),
        ({"target_new": "x" * 501}, "too long: target"),
        ({"target_new": "a\nb"}, "hidden character: target"),
        ({"target_new": "a\ud800"}, "hidden character: target"),
        ({"target_new": "{}"}, "holds {}"),
        ({"target_new": " Spain"}, "no change"),
        ({"prompt": "Autonomous University of Madrid" + " x" * 1000}, "too long: relation"),
    ],
)
def test_a_record_that_cannot_be_an_edit_is_told_with_its_reason(change, reason):
    """By number, line and case; the others are imported."""
    found, [row], survey = imported([flat("Rome"), {**flat(), **change}, flat("Oslo")], "counterfact-flat")
    assert [edit.subject for edit in found] == ["Rome", "Oslo"]
    assert (row.record, row.case, row.reason, row.aside) == (2, "4", reason, False)
    assert survey.refused == {reason: 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rephrase_prompt": "What of {}?"}, "holds {}"),
        ({"rephrase_prompt": "a\u200bb"}, "hidden character"),
        ({"rephrase_prompt": 7.5}, "field of another type"),
        ({"rephrase_prompt": "x" * 2001}, "too long"),
        ({"rephrase_prompt": "Autonomous University of Madrid, which is located in"}, "repeated"),
        ({"ground_truth": "a\u202eb"}, "hidden character"),
        ({"locality_prompt": "Autonomous University of Madrid, in"}, "asks for what changes"),
        ({"locality_ground_truth": ["Spain", ""]}, "empty"),
        ({"locality_prompt": {"a": 1}}, "field of another type"),
    ],
)
def test_what_a_spec_cannot_hold_stays_under_extra(change, reason):
    """The edit is imported without it, and says so; the value is there as it was."""
    record = {**flat(), **change}
    edit, asides = one(record, "counterfact-flat")
    assert reason in asides
    assert json.loads(edit.extra).items() >= change.items()
    assert lost(record, [edit]) == []


def test_a_literal_slot_is_never_the_subject():
    """CounterFact's paraphrases are texts: braces of any kind in them stay what they are."""
    record = cf(paraphrase_prompts=["{| x |} Danielle Darrieux {0} {city}", "A {} of Danielle Darrieux"])
    edit, asides = one(record)
    assert edit.paraphrase_prompts == ("{| x |} Danielle Darrieux {0} {city}",)
    assert asides == ["holds {}"]


def test_records_are_held_against_each_other():
    """One prompt or one subject and relation with two targets, and one edit twice; the first counts."""
    records = [cf(), cf(new="Dutch"), cf(prompt="{} spoke", new="Dutch"), cf(case_id=9), cf(prompt="{} spoke")]
    found, rows, survey = imported(records)
    assert survey.refused == {"conflict": 2, "repeated": 1}
    assert [row.record for row in rows if not row.aside] == [2, 3, 4]
    assert all("record 1" in row.message for row in rows if not row.aside)
    assert [edit.relation for edit in found] == ["The mother tongue of {} is", "{} spoke"]


def test_a_probe_of_what_a_later_record_changes_stays_aside():
    """Its answer will not stay, so it would be a problem of the specs; before that record and after it."""
    asked = {"neighborhood_prompts": ["The mother tongue of Rome is", "The mother tongue of Oslo is"]}
    found, rows, _ = imported([cf("Oslo"), cf("Ada", **asked), cf("Rome")])
    assert found[1].locality == ()
    assert [row.reason for row in rows] == ["asks for what changes"] * 2
    assert json.loads(found[1].extra)["neighborhood_prompts"] == asked["neighborhood_prompts"]


def test_edits_whose_words_make_one_name_get_names_of_their_own():
    """By the number of the record."""
    found, _, _ = imported([cf("Café"), cf("Cafe"), cf("CAFE")])
    assert [edit.id for edit in found] == [found[0].id, found[0].id + "-2", found[0].id + "-3"]


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([cf("A b"), cf("C d")]),
        json.dumps([cf("A b"), cf("C d")], indent=4).replace("\n", "\r\n"),
        "\ufeff" + json.dumps([cf("A b"), cf("C d")], ensure_ascii=False),
        json.dumps(cf("A b")) + "\n" + json.dumps(cf("C d")) + "\n",
        json.dumps({"one": cf("A b"), "two": cf("C d")}),
        "\n\n [" + json.dumps(cf("A b")) + "\n,\n" + json.dumps(cf("C d")) + "]\n\n",
    ],
    ids=["list", "windows", "mark", "lines", "names", "spaces"],
)
def test_records_are_found_in_every_form_of_a_file(text):
    """And read alike; a name that no field has is kept."""
    found, _, survey = imported(text)
    assert [edit.subject for edit in found] == ["A b", "C d"]
    assert survey.records == 2
    if '"one"' in text:
        assert json.loads(found[0].extra)["record name"] == "one"


def test_one_record_alone_is_a_file():
    """Whatever its first key is."""
    for record in VALID.values():
        for shown in (record, dict(reversed(record.items()))):
            assert imported(shown)[2].records == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "bench.json:1: the file is empty"),
        (" \n", "bench.json:2: the file is empty"),
        ("csv,of\na,b\n", "bench.json:1: no JSON list or object of records; it begins with"),
        ("[", "bench.json:1: not valid JSON: Expecting value (column 2)"),
        ('[{"a": 1},\n {"b": ]', "bench.json:2: not valid JSON: Expecting value (column 8)"),
        ('[{"a": 1} {"b": 2}]', 'bench.json:1: not valid JSON: "{" where the list should go on or end (column 11)'),
        ('[{"a": 1},]', "bench.json:1: a comma before the end of the list"),
        ('[{"a": 1}', "bench.json:1: the file ends within the list"),
        ('[{"a": "x', "bench.json:1: not valid JSON: Unterminated string starting at (column 8)"),
        ('[{"a": 1}]\n[]', "bench.json:2: more text follows where the records end"),
        ('{"a": {"case_id": 1}', "bench.json:1: the file ends within the object"),
        ('{"a": {"case_id": 1}, 2: 3}', 'bench.json:1: not valid JSON: "2" where the object should go on'),
        ('{"case_id": 1},\n{"case_id": 2}', "bench.json:1: records without brackets around them"),
        ("[" * 100_000, "bench.json:1: nests too deep"),
        ("[1" + "0" * 5000 + "]", "bench.json:1: a number has too many digits"),
        (b'[{"a": 1},\n"\xff"]', "bench.json:2: not UTF-8 text: byte 0xff"),
        (b"\xff\xfe[\x00", "bench.json:1: not UTF-8 text: byte 0xff"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(text, problem):
    """In the words of what is there, with a remedy; nothing is written."""
    with pytest.raises(InvalidInput) as caught:
        imported(text, "counterfact")
    [told] = caught.value.problems
    assert str(told).startswith(problem)
    assert told.hint
    assert [path.name for path in Path().iterdir()] == ["bench.json"]


def test_files_that_are_not_there_are_told():
    """Missing, a folder, a name nobody can have."""
    Path("folder").mkdir()
    for name in ("missing.json", "folder", "a\0b"):
        for form in ("", "zsre"):
            with pytest.raises(InvalidInput, match="cannot be read"):
                Importer(Path(name), form).look()


def test_what_can_be_read_only_once_is_refused():
    """A pipe is not waited for; a file of that odd name is one."""
    os.mkfifo("pipe")
    for name in ("pipe", "/dev/null", "-"):
        for form in ("", "zsre"):
            with pytest.raises(InvalidInput, match="is no regular file, and an import is read twice") as caught:
                Importer(Path(name), form)
            assert "save it to a file" in caught.value.hint
    assert "no regular file" in str(run("import", "-", "-o", "x.toml").exception)
    Path("-").write_text(json.dumps([cf()]))
    assert Importer(Path("-")).look().edits == 1


def test_a_line_is_where_a_record_begins_however_far_in_the_file(monkeypatch):
    """With a window so small that records, numbers and characters of several bytes lie across its end."""
    data = [cf(f"Žofie {number}", case_id=number) for number in range(40)]
    text = json.dumps(data, indent=1, ensure_ascii=False)
    wanted = [text[: found.start()].count("\n") + 1 for found in re.finditer(r"^ \{", text, re.M)]
    for size in (1, 7, 100, 5000):
        monkeypatch.setattr(stream, "_WINDOW", size)
        FILE.write_text(text, encoding="utf-8")
        found = list(stream.records(FILE, lambda value: True))
        assert [(record.number, record.line) for record in found] == list(enumerate(wanted, 1))
        assert [record.value for record in found] == data
        FILE.write_text("[1234567, 2.5e3, true, null]")
        assert [record.value for record in stream.records(FILE, lambda value: True)] == [1234567, 2500.0, True, None]


def test_a_record_that_never_ends_is_not_read_to_the_end_of_memory(monkeypatch):
    """The window has a limit."""
    monkeypatch.setattr(stream, "_WINDOW", 100)
    monkeypatch.setattr(stream, "MAX_RECORD", 1000)
    FILE.write_text('[{"a": "' + "x" * 10_000)
    with pytest.raises(InvalidInput) as caught:
        list(stream.records(FILE, lambda value: True))
    assert "longer than" in str(caught.value.problems[0])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"case_id": 1, "case_id": 2}', "key twice"),
        ('{"requested_rewrite": {"a": 1, "a": 1}}', "key twice"),
        ("7", "no record"),
        ("[1]", "no record"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nests too deep"),
    ],
)
def test_values_that_are_no_records_are_told_and_the_rest_imported(record, reason):
    """Nothing is taken for granted of what stands between two records."""
    found, [row], _ = imported(f"[{json.dumps(cf('A b'))}, {record}, {json.dumps(cf('C d'))}]")
    assert len(found) == 2
    assert (row.record, row.reason) == (2, reason)


def test_a_record_larger_than_a_spec_keeps_is_refused():
    """Rather than cut."""
    found, [row], _ = imported([cf("A b"), cf("C d", attribute_prompts=["é" * 200_000])])
    assert len(found) == 1
    assert row.reason == "too long: record"


def test_raw_control_characters_in_texts_are_read_and_told():
    """JSON wants them escaped; what is meant is plain."""
    text = json.dumps([cf(paraphrase_prompts=["One NEW line"])]).replace("NEW", "\n")
    edit, rows, _ = imported(text)
    assert edit[0].paraphrases == ("One \n line",)
    assert [row.reason for row in rows] == ["raw control characters"]


def test_formats_that_cannot_be_told_apart_are_named():
    """Too few fields, none known, or a name nobody has."""
    with pytest.raises(InvalidInput, match="may be counterfact-flat or knowedit"):
        imported([{"prompt": "A b is", "subject": "A b", "target_new": "c"}])
    assert imported([{"prompt": "A b is", "subject": "A b", "target_new": "c"}], "knowedit")[0]
    with pytest.raises(InvalidInput, match="is of no known format: its records have a, b"):
        imported([{"a": 1, "b": 2}])
    with pytest.raises(InvalidInput, match="no format"):
        imported([cf()], "counterfct")
    with pytest.raises(InvalidInput, match="--target is for zsRE"):
        imported([cf()], target="alt")
    assert imported([3, {"a": 1}, cf()])[2].refused == {"no record": 1, "field missing": 1}


def test_every_name_of_a_format_names_one_that_is_there():
    """The light list that the command line reads, and the one that reads records."""
    assert list(NAMES) == list(FORMATS)
    assert {name_of(name.upper()) for name in ALIASES} <= set(NAMES)
    assert name_of("nothing") == ""
    assert set(VALID) == set(FORMATS)


def test_more_edits_than_a_file_takes_become_several_files(monkeypatch):
    """Numbered; an earlier import of that name goes, whatever its number of files; other files stay."""
    records = [cf(f"Ada {number}") for number in range(7)]
    Path("specs").mkdir()
    Path("specs/cf-2.toml").write_text("version = 1\n")
    out = Path("specs/cf.toml")
    for limit, names in [(3, ["cf-001", "cf-002", "cf-003"]), (10, ["cf"]), (4, ["cf-001", "cf-002"])]:
        monkeypatch.setattr("editctl.importers.work.MAX_EDITS", limit)
        found, _, _ = imported(records, out=out)
        assert [edit.subject for edit in found] == [f"Ada {number}" for number in range(7)]
        there = sorted(path.stem for path in Path("specs").iterdir())
        assert there == sorted([*names, "cf-2"])
    monkeypatch.setattr("editctl.importers.work.MAX_PART", 2500)
    assert len({edit.file for edit in imported(records, out=out)[0]}) > 2
    assert all(len(path.read_bytes()) < 2600 for path in Path("specs").iterdir())


def test_a_file_that_changes_while_it_is_read_is_not_imported():
    """Between the two readings; nothing is left behind."""
    FILE.write_text(json.dumps([cf("A b"), cf("C d")]))
    importer = Importer(FILE)
    importer.look()
    FILE.write_text(json.dumps([cf("A b"), cf("E f"), cf("G h")]))
    with pytest.raises(InvalidInput, match="changed while it was read"):
        importer.write(Path("specs.toml"))
    assert [path.name for path in Path().iterdir()] == ["bench.json"]


def test_what_fails_while_writing_leaves_the_earlier_files(monkeypatch):
    """All files are put in place at the end, or none."""
    imported([cf("A b")], out="specs.toml")
    before = Path("specs.toml").read_bytes()
    monkeypatch.setattr(amend, "table", lambda edit: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        imported([cf("C d")], out="specs.toml")
    assert Path("specs.toml").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["bench.json", "specs.toml"]


@pytest.mark.timing
def test_a_large_file_is_imported_in_flat_memory():
    """4,000 records in as much memory as 400, within what 21,919 may take in 30 s."""
    import subprocess
    import sys
    import time

    peaks = []
    for count in (400, 4000):
        FILE.write_text(json.dumps([cf(f"Ada {number}", case_id=number) for number in range(count)]))
        code = "import resource, sys\nfrom pathlib import Path\nfrom editctl.importers.work import Importer\n"
        code += "made = Importer(Path('bench.json')); made.look(); made.write(Path('specs.toml'))\n"
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    factor = float(os.environ.get("EDITCTL_TIME_FACTOR", "1"))
    assert time.perf_counter() - begun < 30 * 4000 / 21_919 * factor
    assert peaks[1] - peaks[0] < 12, peaks


# ---------------------------------------------------------------------------------------------------------------------
# Random changes

ODD = [
    None,
    True,
    7,
    -2.5,
    1e400,
    "",
    " ",
    "x" * 2500,
    "a\x1bb",
    "a\ud800",
    "{}",
    "{} {}",
    "Rome",
    [],
    {},
    [[]],
    [1, "a"],
]
ODD += [{"json": "null"}, {"prompt": "a", "ground_truth": "b"}, "\u202e", " padded ", 10**30, ["a", ["b", ["c"]]], "\0"]


def places(value, path=()):
    """The way to every value inside one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(rng, record):
    """The record with one to three values changed, taken out, doubled or exchanged."""
    record = json.loads(json.dumps(record))
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(list(places(record)) or [()])
        holder = record
        for part in path[:-1]:
            holder = holder[part]
        if not path:
            continue
        act = rng.randrange(5)
        if act == 0:
            del holder[path[-1]]
        elif act == 1 and isinstance(holder, list):
            holder.append(holder[path[-1]])
        elif act == 2 and isinstance(holder[path[-1]], str):
            text = holder[path[-1]]
            holder[path[-1]] = rng.choice([text.upper(), f" {text} ", text + text, text[: len(text) // 2], f"{text}\n"])
        else:
            holder[path[-1]] = deepcopy(rng.choice(ODD))
    return record


def never_lost(records, form):
    """Import them: no crash; each record is told or wholly held; what is written is valid (`imported` checks that)."""
    try:
        found, rows, survey = imported(records, form)
    except InvalidInput as error:
        assert "records" in error.message or error.problems or "holds no" in error.message
        return
    told = {row.record for row in rows if not row.aside}
    assert survey.records == len(records)
    assert len(told) == sum(survey.refused.values())
    for number, record in enumerate(records, 1):
        if number not in told:
            assert lost(record, from_record(number, found)) == [], (form, record)
    if not found:
        assert len(told) == len(records)


@pytest.mark.parametrize("form", VALID)
@quick
@given(st.integers(0, 2**32))
def test_changed_records_are_imported_whole_or_told(form, seed):
    """Any change to any value of a valid record, beside a valid one and a copy."""
    rng = random.Random(f"{form} {seed}")
    records = [VALID[form], mutated(rng, VALID[form]), mutated(rng, VALID[form]), VALID[form]]
    rng.shuffle(records)
    never_lost(records, form)


@sampled
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, _, edits, _, _) in EVERY.items() if edits])
def test_changed_records_of_the_samples_are_imported_whole_or_told(name):
    """2,000 changes of real records for each file."""
    data = [record.value for record in stream.records(SAMPLES / name, lambda value: "requested_rewrite" in value)]
    rng = random.Random(name)
    for _ in range(200):
        never_lost([mutated(rng, rng.choice(data)) for _ in range(10)], EVERY[name][0])


@quick
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode), st.sampled_from(["", *VALID]))
def test_no_bytes_make_an_importer_raise(data, form):
    """Any bytes, under any name of a format, detected or not."""
    never_raises(data, form)


@quick
@given(st.integers(0, 2**32), st.sampled_from(list(VALID)))
def test_no_cut_or_changed_bytes_of_a_good_file_make_an_importer_raise(seed, form):
    """A file cut anywhere, with bytes changed or put in."""
    rng = random.Random(seed)
    data = bytearray(json.dumps([VALID[form], VALID[form]], ensure_ascii=False).encode())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.choice([b"", b"[", b"}", b'"', b",", b"\\", b"\xff", b"\n", b"0", b":"])
    never_raises(bytes(data[: rng.choice([len(data), rng.randrange(len(data) + 1)])]), form)


def never_raises(data, form):
    """Import, and let only errors of input pass, each with words."""
    try:
        imported(data, form)
    except InvalidInput as error:
        assert error.message
        assert error.hint


# ---------------------------------------------------------------------------------------------------------------------
# CounterFact again


def exported(edits):
    counterfact.write(edits, Path("out.json"))
    return json.loads(Path("out.json").read_text())


def test_a_handwritten_spec_becomes_a_counterfact_record():
    """What the format has no place for is counted; an edit without a case gets a free one."""
    probes = (Probe(prompt="Rome is in", answer=("Italy",)), Probe(prompt="{} is made of"))
    more = {"portability": (Probe(prompt="x", answer=("y",)),), "note": "moved", "target_true": "Paris"}
    edit = Edit(
        subject="Ada", relation="{} is in", target_new="Oslo", locality=probes, paraphrases=("{} lies",), **more
    )
    [taken] = imported([cf(case_id=1)])[0]
    first, second, third = exported([edit, taken, edit])
    assert first == {
        "case_id": 0,
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": "Ada",
            "target_new": {"str": "Oslo"},
            "target_true": {"str": "Paris"},
        },
        "paraphrase_prompts": ["Ada lies"],
        "neighborhood_prompts": ["Rome is in", "Ada is made of"],
        "generation_prompts": [],
        "attribute_prompts": [],
    }
    assert second == cf(case_id=1)
    assert third["case_id"] == 2
    assert counterfact.left_behind([edit]) == {"portability probe": 1, "note": 1, "locality answer": 1}


def test_what_was_kept_aside_comes_out_unless_the_spec_says_otherwise_now():
    """Doubled neighbours and padded paraphrases survive; after a change by hand the spec's own words count."""
    record = cf(
        paraphrase_prompts=["Danielle Darrieux spoke "], neighborhood_prompts=["Léon spoke", "Léon spoke", "X {} y"]
    )
    [edit], _, _ = imported([record])
    assert exported([edit]) == [record]
    changed = edit.model_copy(update={"paraphrases": ("{} wrote",)})
    [again] = exported([changed])
    assert again["paraphrase_prompts"] == ["Danielle Darrieux wrote"]
    assert again["neighborhood_prompts"] == ["Léon spoke"]
    assert again["case_id"] == record["case_id"]


@pytest.mark.parametrize("form", VALID)
def test_specs_of_every_format_become_counterfact_that_imports_again(form):
    """With the same prompts and targets; whatever stands under `extra`."""
    found, _, _ = imported([VALID[form]])
    for extra in (None, '{"requested_rewrite":7,"case_id":"x"}', '{"records":[]}', '{"paraphrase_prompts":[1]}'):
        edits = [edit.model_copy(update={} if extra is None else {"extra": extra}) for edit in found]
        FILE.write_text(json.dumps(exported(edits)))
        again, _, _ = imported(FILE, "counterfact")
        told = [(edit.prompt, edit.target_new, edit.target_true, edit.paraphrase_prompts) for edit in edits]
        assert [(edit.prompt, edit.target_new, edit.target_true, edit.paraphrase_prompts) for edit in again] == told


@quick
@given(st.integers(0, 2**32))
def test_changed_counterfact_records_come_out_as_they_went_in(seed):
    """Whatever was changed in them, when they can be imported at all and are of the schema."""
    rng = random.Random(seed)
    record = cf()
    for name in ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts", "attribute_prompts"):
        texts = [*record[name], " x ", "{} y", "Danielle Darrieux", "a\u200b", "z" * 2100, "", record[name][0]]
        record[name] = rng.sample(texts, rng.randrange(len(texts)))
    found, _, _ = imported([record])
    assert exported(found) == [record]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def run(*words):
    """A command's exit code and what it printed on both streams; errors of input as exceptions."""
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=True)


def test_import_prints_the_files_and_tells_the_rest():
    """stdout has the spec files alone; stderr the format, what is refused and the counts."""
    FILE.write_text(json.dumps([cf(), cf(new="Dutch"), cf("Ada", paraphrase_prompts=["a\u200b"])]))
    for words in (["import", FILE], ["import", "counterfact", FILE], ["import", "multi_counterfact", FILE]):
        done = run(*words, "-o", "specs/", "--yes")
        assert done.exit_code == 0, done.output
        assert done.stdout == "specs/bench.toml\n"
        assert "2 of 3 records imported as 2 edits" in done.stderr
        assert "line 1, record 2 (case 0): contradicts record 1" in done.stderr
        assert "not imported: 1 conflict" in done.stderr
        assert "kept under extra: 1 hidden character" in done.stderr
        assert ("(detected)" in done.stderr) is (len(words) == 2)
    assert run("validate", "specs").exit_code == 0
    assert [edit.subject for edit in spec.load([Path("specs")])] == ["Danielle Darrieux", "Ada"]


def test_import_as_json_is_one_object_a_line():
    """The format, every record that is refused or not whole, the files, the counts."""
    FILE.write_text(json.dumps([zsre(), zsre(subject="Ada")]))
    done = run("import", "--json", FILE, "--target", "answers", "-o", "z.toml")
    lines = [json.loads(line) for line in done.stdout.splitlines()][1:]
    assert lines[0] == {
        "type": "importing",
        "file": "bench.json",
        "format": "zsre",
        "detected": True,
        "target": "answers",
    }
    assert [line["type"] for line in lines] == ["importing", "refused", "file", "summary"]
    assert lines[1]["record"] == 2
    assert lines[2] == {"type": "file", "path": "z.toml", "edits": 1}
    counts = {"records": 2, "edits": 1, "merged": 0, "refused": {"subject absent": 1}, "asides": {}}
    assert lines[3] == {"type": "summary", **counts}


def test_a_dry_run_tells_all_and_writes_nothing():
    """With a place for the specs and without one; what is refused as a whole is refused alike."""
    FILE.write_text(json.dumps([cf(), cf(new="Dutch")]))
    for more in ((), ("-o", "x.toml")):
        done = run("import", FILE, "--dry-run", *more)
        assert (done.exit_code, done.stdout) == (0, "")
        assert "1 of 2 records can be imported as 1 edit" in done.stderr
        assert "not imported: 1 conflict" in done.stderr
    lines = [json.loads(line) for line in run("import", FILE, "--dry-run", "--json").stdout.splitlines()]
    assert [line["type"] for line in lines[1:]] == ["importing", "refused", "summary"]
    assert isinstance(run("import", FILE, "--dry-run", "--strict").exception, InvalidInput)
    done = run("import", FILE)
    assert "not said where the specs go" in str(done.exception) and "-o" in done.exception.hint
    assert [path.name for path in Path().iterdir()] == ["bench.json"]


def test_strict_writes_nothing_when_a_record_is_refused():
    """All of them are told as problems; without a fault it imports."""
    FILE.write_text(json.dumps([cf(), cf(new="Dutch"), cf(new="")]))
    done = run("import", FILE, "-o", "x.toml", "--strict")
    assert isinstance(done.exception, InvalidInput)
    assert done.exception.message == "2 of 3 records in bench.json cannot be edits"
    assert [problem.line for problem in done.exception.problems] == [1, 1]
    assert "without --strict" in done.exception.hint
    assert not Path("x.toml").exists()
    assert run("import", FILE, "-o", "x.toml", "--strict", "--limit", 1).exit_code == 0
    assert len(spec.load([Path("x.toml")])) == 1


def test_files_are_neither_replaced_nor_deleted_unasked(monkeypatch):
    """What is replaced is told apart from the parts of an earlier import that are deleted; --json names those too."""
    FILE.write_text(json.dumps([cf(f"Ada {number}") for number in range(6)]))
    monkeypatch.setattr("editctl.importers.work.MAX_EDITS", 2)
    assert run("import", FILE, "-o", "x.toml").exit_code == 0
    before = {path: path.read_bytes() for path in Path().iterdir()}
    more = ("import", FILE, "-o", "x.toml", "--limit", "4")
    done = run(*more)
    assert isinstance(done.exception, InvalidInput)
    told = "x-001.toml, x-002.toml would be replaced and x-003.toml would be deleted"
    assert told in done.exception.message
    assert "--yes to replace and delete" in done.exception.hint
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    questions = []
    monkeypatch.setattr("editctl.cli_import.confirm", questions.append)
    assert "deleted x-003.toml" in run(*more).stderr
    assert questions == ["Replace x-001.toml, x-002.toml and delete x-003.toml?"]
    lines = run(*more[:-1], "1", "--yes", "--json").stdout.splitlines()
    assert [json.loads(line)["path"] for line in lines if '"deleted"' in line] == ["x-001.toml", "x-002.toml"]
    assert sorted(path.name for path in Path().iterdir()) == ["bench.json", "x.toml"]


def test_files_that_no_import_wrote_are_never_deleted(monkeypatch):
    """Whatever their names, also within a series of parts; nor another import's of a number far off."""
    FILE.write_text(json.dumps([cf(f"Ada {number}") for number in range(4)]))
    monkeypatch.setattr("editctl.importers.work.MAX_EDITS", 1)
    assert run("import", FILE, "-o", "x.toml").exit_code == 0
    Path("x-2024.toml").write_bytes(Path("x-001.toml").read_bytes())
    mine = "# my facts, imported as counterfactual thoughts\nversion = 1\n"
    for name in ("x-003.toml", "x-01.toml", "x-2025.toml"):
        Path(name).write_text(mine)
    assert run("import", FILE, "-o", "x.toml", "--limit", "1", "--yes").exit_code == 0
    kept = ["x-003.toml", "x-01.toml", "x-2024.toml", "x-2025.toml"]
    assert sorted(path.name for path in Path().iterdir()) == ["bench.json", *kept, "x.toml"]
    Path("x.toml").write_text(mine)
    assert run("import", FILE, "-o", "x.toml", "--limit", "2", "--yes").exit_code == 0
    assert {Path(name).read_text() for name in ("x.toml", "x-003.toml", "x-01.toml", "x-2025.toml")} == {mine}


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["import", "counterfct", FILE, "-o", "x.toml"], 'no format "counterfct"', 'did you mean "counterfact"?'),
        (["import", FILE, "-o", "x"], "x is no name of a spec file", "ends in .toml"),
        (
            ["import", "zsre", FILE, "-o", "x.toml"],
            "1 of 1 record in bench.json cannot be edits",
            "look like counterfact",
        ),
        (["import", "missing.json", "-o", "x.toml"], "missing.json cannot be read", "name a file"),
    ],
)
def test_what_import_is_asked_wrongly_is_told(words, message, hint):
    """With what to do instead."""
    FILE.write_text(json.dumps([cf()]))
    done = run(*words)
    assert isinstance(done.exception, InvalidInput)
    assert message in done.exception.message
    assert hint in done.exception.hint


def test_export_specs_writes_the_file_and_tells_what_stays_behind():
    """And does not replace a file unasked."""
    FILE.write_text(json.dumps([zsre()]))
    assert run("import", FILE, "-o", "x.toml").exit_code == 0
    done = run("export-specs", "x.toml", "-o", "y.json")
    assert (done.exit_code, done.stdout) == (0, "y.json\n")
    assert "CounterFact has no place for 1 portability probe, 1 locality answer" in done.stderr
    assert isinstance(run("export-specs", "x.toml", "-o", "y.json").exception, InvalidInput)
    line = json.loads(run("export-specs", "x.toml", "-o", "y.json", "--yes", "--json").stdout.splitlines()[-1])
    assert line == {
        "type": "exported",
        "file": "y.json",
        "records": 1,
        "left_behind": {"portability probe": 1, "locality answer": 1},
    }
