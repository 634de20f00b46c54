"""Specs: what is read from TOML, what is refused and in which words, and what is not read again."""

import json
import os
import re
from pathlib import Path

import pytest
import tomli
import tomlkit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from editctl import spec
from editctl.errors import InvalidInput
from editctl.spec import Edit, Probe, Shelf, check, fill, json_schema, load, visible

ROOT = Path(__file__).parents[1]
SAMPLES = Path(os.environ.get("EDITCTL_SAMPLES", ROOT / "../shared/data")) / "malformed"
FILE = Path("spec.toml")
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Every test has a folder of its own, so that messages name a file without its folder."""
    monkeypatch.chdir(tmp_path)


def checked(text):
    """The report on a file with this text."""
    FILE.write_bytes(text if isinstance(text, bytes) else text.encode())
    return check([FILE])


def edit(subject="The Eiffel Tower", relation="{} is in", target_new="Rome"):
    """A file of five lines with one edit, its texts in TOML's own escapes."""
    return f'version = 1\n[[edit]]\nsubject = "{subject}"\nrelation = "{relation}"\ntarget_new = "{target_new}"\n'


HEAD = """version = 1

[[edit]]
subject = "The Eiffel Tower"
relation = "{} is in"
target_new = "Rome"
"""
ANOTHER = """
[[edit]]
subject = "The Louvre"
relation = "{} is in"
target_new = "Oslo"
"""

BAD = [
    pytest.param(
        '[[edit]]\nsubject = "Rome"\nrelation = "{} is in"\ntarget_new = "Spain"\n',
        "spec.toml:1: version is missing",
        "write version = 1 as the first line",
        id="version-missing",
    ),
    pytest.param(
        '# ours\nversion = 2\n[[edit]]\nsubject = "Rome"\nrelation = "{} is in"\ntarget_new = "Spain"\n',
        "spec.toml:2: version is 2, which this editctl cannot read",
        "write version = 1",
        id="version-of-the-future",
    ),
    pytest.param(
        'version = "1"\n[[edit]]\nsubject = "Rome"\nrelation = "{} is in"\ntarget_new = "Spain"\n',
        'spec.toml:1: version is "1", which this editctl cannot read',
        "write version = 1",
        id="version-in-quotes",
    ),
    pytest.param(
        'version = true\n[[edit]]\nsubject = "Rome"\nrelation = "{} is in"\ntarget_new = "Spain"\n',
        "spec.toml:1: version is true, which this editctl cannot read",
        "write version = 1",
        id="version-a-boolean",
    ),
    pytest.param(
        "version = 1\n[[edit]]\nsubject = Rome\n",
        "spec.toml:3: not valid TOML: Invalid value",
        "text stands in double quotes, lists in [ ]; see toml.io",
        id="not-toml",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = """Rome\n\n\n',
        "spec.toml:3: not valid TOML: Unterminated string",
        "text stands in double quotes, lists in [ ]; see toml.io",
        id="string-never-ends",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = "Rome"\nsubject = "Oslo"\n',
        "spec.toml:4: not valid TOML: Cannot overwrite a value",
        "the same key stands here twice",
        id="key-twice",
    ),
    pytest.param(
        "version = 1\nx = " + "[" * 2000 + "]" * 2000,
        "spec.toml:1: not valid TOML: TOML inline arrays/tables are nested more than the allowed 400 levels",
        "no key takes such a value",
        id="lists-too-deep",
    ),
    pytest.param(
        "version = " + "1" * 5000,
        "spec.toml:1: not valid TOML: "
        "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
        "no key takes such a value",
        id="number-too-long",
    ),
    pytest.param(
        "version = 0x" + "f" * 5000,
        "spec.toml:1: version is a number, which this editctl cannot read",
        "write version = 1",
        id="number-too-long-to-write",
    ),
    pytest.param(
        "version = 1\n\n[" + ".".join("a" * 17) + "]\n" + "x = 1\n" * 2,
        "spec.toml:3: not valid TOML: a key has more than 16 parts",
        "no key of editctl's files has that many",
        id="key-of-too-many-parts",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = "\x1b[31mRome"\n',
        "spec.toml:3: not valid TOML: Illegal character '\\x1b'",
        "text stands in double quotes, lists in [ ]; see toml.io",
        id="raw-escape-character",
    ),
    pytest.param(
        'version = 1\n[edit]\nsubject = "Rome"\n',
        "spec.toml:2: edit is a table, not a list of tables",
        "write [[edit]], in two brackets",
        id="single-brackets",
    ),
    pytest.param(
        'version = 1\nedit = ["Rome"]\n',
        "spec.toml:2: edit 1 is a string, not a table",
        "write an [[edit]] table",
        id="edit-is-text",
    ),
    pytest.param(
        'version = 1\nmodel = "gpt2"\n',
        'spec.toml:2: unknown key "model"',
        "known: version, method, edit",
        id="unknown-top-level-key",
    ),
    pytest.param(
        'version = 1\nmethods = "memit"\n',
        'spec.toml:2: unknown key "methods"',
        'did you mean "method"?',
        id="near-top-level-key",
    ),
    pytest.param(
        HEAD + 'paraphrase = ["{} stands in"]\n',
        'spec.toml:7: unknown key "paraphrase"',
        'did you mean "paraphrases"?',
        id="unknown-key",
    ),
    pytest.param(
        HEAD + '"\\u001b[2J" = 1\n',
        'spec.toml:7: unknown key "\\x1b[2J"',
        "known: id, subject, relation, target_new, target_true, paraphrases, locality, portability, source, note, "
        "tags, generation, …",
        id="unknown-key-with-escape",
    ),
    pytest.param(
        HEAD + 'method = "memit"\n',
        'spec.toml:7: unknown key "method"',
        "write it above the first [[edit]]",
        id="method-inside-an-edit",
    ),
    pytest.param(
        "version = 1\nmethod = 5\n",
        "spec.toml:2: method is a number, not a string",
        'write it in quotes: "5"',
        id="method-not-text",
    ),
    pytest.param(
        'version = 1\n\n[[edit]]\nrelation = "{} is in"\ntarget_new = "Rome"\n',
        "spec.toml:3: subject is missing",
        'every edit needs subject = "…"',
        id="subject-missing",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = "Rome"\nrelation = "{} was founded in"\ntarget_new = 1969\n',
        "spec.toml:5: target_new is a number, not a string",
        'write it in quotes: "1969"',
        id="target-a-number",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = "Rome"\nrelation = "{} was founded on"\ntarget_new = 1969-07-20\n',
        "spec.toml:5: target_new is a date or time, not a string",
        'write it in quotes: "1969-07-20"',
        id="target-a-date",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = "Rome"\nrelation = "{} is old:"\ntarget_new = true\n',
        "spec.toml:5: target_new is a boolean, not a string",
        'write it in quotes: "true"',
        id="target-a-boolean",
    ),
    pytest.param(
        'version = 1\n[[edit]]\nsubject = "Rome"\nrelation = "{} is in"\ntarget_new = ["Spain"]\n',
        "spec.toml:5: target_new is a list, not a string",
        "write one string in quotes",
        id="target-a-list",
    ),
    pytest.param(
        edit(subject=""),
        "spec.toml:3: subject is empty",
        "write it",
        id="subject-empty",
    ),
    pytest.param(
        edit(target_new="   "),
        "spec.toml:5: target_new is empty",
        "write it",
        id="target-blank",
    ),
    pytest.param(
        edit(subject="x" * 201),
        "spec.toml:3: subject has 201 characters, at most 200 are allowed",
        "say it shorter",
        id="subject-too-long",
    ),
    pytest.param(
        edit(target_new="x" * 501),
        "spec.toml:5: target_new has 501 characters, at most 500 are allowed",
        "say it shorter",
        id="target-too-long",
    ),
    pytest.param(
        edit(target_new="Rome "),
        'spec.toml:5: target_new begins or ends with a space: "Rome "',
        "take it out: a space at the end changes the tokens of the prompt and of its answer",
        id="target-ends-in-space",
    ),
    pytest.param(
        edit(relation=" {} is in"),
        'spec.toml:4: relation begins or ends with a space: " {} is in"',
        "take it out: a space at the end changes the tokens of the prompt and of its answer",
        id="relation-begins-with-space",
    ),
    pytest.param(
        edit(subject="\\u001b[31mRome"),
        'spec.toml:3: subject contains a control character \\x1b: "\\x1b[31mRome"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="subject-with-escape",
    ),
    pytest.param(
        edit(subject="Ro\\u0000me"),
        'spec.toml:3: subject contains a control character \\x00: "Ro\\x00me"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="subject-with-nul",
    ),
    pytest.param(
        edit(subject="Ro\\tme"),
        'spec.toml:3: subject contains a control character \\t: "Ro\\tme"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="subject-with-tab",
    ),
    pytest.param(
        edit(subject="Rome\\u202eemor"),
        'spec.toml:3: subject contains a direction override \\u202e: "Rome\\u202eemor"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="subject-turned-around",
    ),
    pytest.param(
        edit(subject="Ro\\u200bme"),
        'spec.toml:3: subject contains an invisible character \\u200b: "Ro\\u200bme"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="subject-with-zero-width",
    ),
    pytest.param(
        edit(subject="Ro\\u2028me"),
        'spec.toml:3: subject contains a line break \\u2028: "Ro\\u2028me"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="subject-with-line-separator",
    ),
    pytest.param(
        edit(relation="{} is\\u0007 in"),
        'spec.toml:4: relation contains a control character \\x07: "{} is\\x07 in"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="relation-with-bell",
    ),
    pytest.param(
        edit(target_new="Rome\\nItaly"),
        'spec.toml:5: target_new contains a line break \\n: "Rome\\nItaly"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="target-with-line-break",
    ),
    pytest.param(
        edit(target_new="{} Rome"),
        "spec.toml:5: target_new contains {}",
        "{} stands for the subject, only in prompts",
        id="target-with-slot",
    ),
    pytest.param(
        edit(subject="The {} Tower"),
        "spec.toml:3: subject contains {}",
        "{} stands for the subject, only in prompts",
        id="subject-with-slot",
    ),
    pytest.param(
        HEAD + 'target_true = "Rome"\n',
        'spec.toml:6: target_new and target_true are both "Rome"',
        "an edit changes something: give another target",
        id="target-as-before",
    ),
    pytest.param(
        edit(relation="Today The Eiffel Tower is in"),
        "spec.toml:4: relation has no place {} for the subject",
        'write relation = "Today {} is in"',
        id="no-slot-but-subject",
    ),
    pytest.param(
        edit(subject="Rome", relation="Rome is not Rome but"),
        "spec.toml:4: relation has no place {} for the subject",
        "the subject stands in it 2 times: write {} for one and reword the others",
        id="no-slot-subject-twice",
    ),
    pytest.param(
        edit(relation="Today the Eifel Tower is in"),
        "spec.toml:4: relation has no place {} for the subject",
        'did you mean "Today {} is in"?',
        id="no-slot-subject-misspelt",
    ),
    pytest.param(
        edit(relation="It is in"),
        "spec.toml:4: relation has no place {} for the subject",
        "write {} where the subject stands",
        id="no-slot-no-subject",
    ),
    pytest.param(
        edit(relation="{} and {} are in"),
        "spec.toml:4: relation has 2 places {} for the subject",
        "keep one {}: the fact is about one subject, looked up at one place",
        id="two-slots",
    ),
    pytest.param(
        edit(subject="Rome", relation="{}, that is Rome, is in"),
        'spec.toml:4: relation names the subject "Rome" beside {}',
        "keep one of the two: the subject is looked up at {}",
        id="subject-beside-slot",
    ),
    pytest.param(
        edit(relation="{0} is in"),
        "spec.toml:4: relation has no place {} for the subject",
        "write {} where the subject stands",
        id="numbered-slot",
    ),
    pytest.param(
        HEAD + 'paraphrases = "{} stands in"\n',
        "spec.toml:7: paraphrases is a string, not a list",
        'write it in brackets: ["…"]',
        id="paraphrases-a-string",
    ),
    pytest.param(
        HEAD + 'paraphrases = [\n  "{} stands in",\n  7,\n]\n',
        "spec.toml:9: paraphrase 2 is a number, not a string",
        'write it in quotes: "7"',
        id="paraphrase-a-number",
    ),
    pytest.param(
        HEAD + 'paraphrases = [\n  "{} stands in", # [ "\n  "{} or {} is in",\n]\n',
        "spec.toml:9: paraphrase 2 has 2 places {} for the subject",
        "keep one {}: the fact is about one subject, looked up at one place",
        id="paraphrase-with-two-slots",
    ),
    pytest.param(
        HEAD + 'paraphrases = ["The Eiffel Tower is in"]\n',
        "spec.toml:7: paraphrase 1 is the prompt of the edit itself",
        "reword it or take it out",
        id="paraphrase-is-the-prompt",
    ),
    pytest.param(
        HEAD + 'paraphrases = [\n  "{} stands in",\n  "The Eiffel Tower stands in",\n]\n',
        "spec.toml:9: paraphrase 2 repeats paraphrase 1",
        "take one out",
        id="paraphrase-twice",
    ),
    pytest.param(
        HEAD + "paraphrases = [" + ", ".join(f'"{{}} {n}"' for n in range(201)) + "]\n",
        "spec.toml:7: paraphrases has 201 items, at most 200 are allowed",
        "keep those that tell most",
        id="too-many-paraphrases",
    ),
    pytest.param(
        HEAD
        + 'locality = [\n  "The Louvre is in",\n\n  { prompt = "The Eiffel Tower is as high as", answer = "x" },\n]\n',
        'spec.toml:10: locality probe 2 is about the subject: "The Eiffel Tower is as high as"',
        "write {} for another fact about the subject that must stay, or move it to portability",
        id="locality-about-the-subject",
    ),
    pytest.param(
        HEAD + 'locality = ["{} is in"]\n',
        "spec.toml:7: locality probe 1 is a prompt that the edit changes",
        "a locality probe asks for what must stay: take it out",
        id="locality-is-the-prompt",
    ),
    pytest.param(
        HEAD + 'paraphrases = ["{} stands in"]\nlocality = ["{} stands in"]\n',
        "spec.toml:8: locality probe 1 is a prompt that the edit changes",
        "a locality probe asks for what must stay: take it out",
        id="locality-is-a-paraphrase",
    ),
    pytest.param(
        HEAD + 'locality = [ "The Louvre is in", { prompt = "The Louvre is in" } ]\n',
        "spec.toml:7: locality probe 2 repeats locality probe 1",
        "take one out",
        id="locality-twice",
    ),
    pytest.param(
        HEAD + 'locality = ["{} {}"]\n',
        "spec.toml:7: locality probe 1 has 2 places {} for the subject",
        "keep one {}: the fact is about one subject, looked up at one place",
        id="locality-with-two-slots",
    ),
    pytest.param(
        HEAD + 'locality = [\n  { prompt = "The Louvre is in", answers = "Paris" },\n]\n',
        'spec.toml:8: unknown key "answers" in locality probe 1',
        'did you mean "answer"?',
        id="locality-unknown-key",
    ),
    pytest.param(
        HEAD + 'locality = [{ answer = "Paris" }]\n',
        "spec.toml:7: prompt of locality probe 1 is missing",
        'write prompt = "…" in the table',
        id="locality-without-prompt",
    ),
    pytest.param(
        HEAD + 'locality = ["The Louvre is in", 3]\n',
        "spec.toml:7: locality probe 2 is a number, not a string or a table",
        'write "prompt" or { prompt = "…", answer = "…" }',
        id="locality-a-number",
    ),
    pytest.param(
        HEAD + 'locality = { prompt = "The Louvre is in" }\n',
        "spec.toml:7: locality is a table, not a list",
        "write a list in brackets: [ ]",
        id="locality-a-table",
    ),
    pytest.param(
        HEAD + 'locality = [{ prompt = "Two and two are", answer = 4 }]\n',
        "spec.toml:7: answer of locality probe 1 is a number, not a string",
        'write it in quotes: "4"',
        id="probe-answer-a-number",
    ),
    pytest.param(
        HEAD + 'locality = [{ prompt = "Two and two are", answer = ["4", ""] }]\n',
        "spec.toml:7: answer 2 of locality probe 1 is empty",
        "write it or take it out",
        id="probe-answer-empty",
    ),
    pytest.param(
        HEAD
        + '[[edit.locality]]\nprompt = "The Louvre is in"\n[[edit.locality]]\nprompt = "The Eiffel Tower weighs"\n',
        'spec.toml:9: locality probe 2 is about the subject: "The Eiffel Tower weighs"',
        "write {} for another fact about the subject that must stay, or move it to portability",
        id="locality-in-tables-of-its-own",
    ),
    pytest.param(
        HEAD + 'portability = ["{} is in the country of"]\n',
        "spec.toml:7: portability probe 1 has no answer",
        'write { prompt = "…", answer = "…" }: only an answer tells whether the edit carried over',
        id="portability-without-answer",
    ),
    pytest.param(
        HEAD + 'portability = [{ prompt = "{} {}", answer = "x" }]\n',
        "spec.toml:7: portability probe 1 has 2 places {} for the subject",
        "keep one {}: the fact is about one subject, looked up at one place",
        id="portability-with-two-slots",
    ),
    pytest.param(
        HEAD + 'tags = ["a", ""]\n',
        "spec.toml:7: tag 2 is empty",
        "write it or take it out",
        id="tag-empty",
    ),
    pytest.param(
        HEAD + 'id = "Eiffel Tower!"\n',
        'spec.toml:7: id "Eiffel Tower!" is not a plain name',
        'use a-z, 0-9, ".", "_" and "-", and begin with a letter or digit: id = "eiffel-tower"',
        id="id-with-capitals",
    ),
    pytest.param(
        HEAD + f'id = "{"x" * 81}"\n',
        "spec.toml:7: id has 81 characters, at most 80 are allowed",
        "say it shorter",
        id="id-too-long",
    ),
    pytest.param(
        HEAD + 'id = "a"\n' + ANOTHER + 'id = "a"\n',
        'spec.toml:13: id "a" is taken by the edit at spec.toml:3',
        'give this edit an id of its own: id = "…"',
        id="id-twice",
    ),
    pytest.param(
        edit(subject="Café") + '\n[[edit]]\nsubject = "Cafe"\nrelation = "{} is in"\ntarget_new = "Oslo"\n',
        'spec.toml:7: id "cafe-is-in" (made from subject and relation) is taken by the edit at spec.toml:2',
        'give this edit an id of its own: id = "…"',
        id="generated-id-twice",
    ),
    pytest.param(
        HEAD + '\n[[edit]]\nsubject = "The Eiffel Tower"\nrelation = "{} is in"\ntarget_new = "Rome"\n',
        'spec.toml:8: duplicate of "the-eiffel-tower-is-in" at spec.toml:3',
        "take one out, and keep the probes of both in the other",
        id="duplicate",
    ),
    pytest.param(
        HEAD + '\n[[edit]]\nid = "again"\nsubject = "The Eiffel Tower"\nrelation = "{} is in"\ntarget_new = "Oslo"\n',
        'spec.toml:8: contradicts "the-eiffel-tower-is-in" at spec.toml:3 ("Rome" -> "Oslo")',
        "a model can be taught one of them; take the other out",
        id="contradiction",
    ),
    pytest.param(
        HEAD + '\n[[edit]]\nsubject = "Eiffel"\nrelation = "The {} Tower is in"\ntarget_new = "Oslo"\n',
        'spec.toml:8: contradicts "the-eiffel-tower-is-in" at spec.toml:3 ("Rome" -> "Oslo")',
        "a model can be taught one of them; take the other out",
        id="contradiction-by-another-template",
    ),
    pytest.param(
        HEAD + 'locality = [\n  "The Louvre is in",\n]\n' + ANOTHER,
        'spec.toml:8: locality probe 1 asks what the edit "the-louvre-is-in" at spec.toml:11 changes',
        "take it out: its answer will not stay",
        id="locality-of-another-edit",
    ),
    pytest.param(
        'version = 1\nedit = [\n  { subject = "Rome", relation = "{} is in", target_new = "Spain" },\n'
        '  { subject = "Oslo",\n    relation = "is in", target_new = "Spain" },\n]\n',
        "spec.toml:5: relation has no place {} for the subject",
        "write {} where the subject stands",
        id="edits-in-one-inline-list",
    ),
    pytest.param(
        HEAD + "source = 5\n",
        "spec.toml:7: source is a number, not a string",
        'write it in quotes: "5"',
        id="source-a-number",
    ),
    pytest.param(
        HEAD + 'note = """\nfine\nnot \\u001b fine"""\n',
        'spec.toml:7: note contains a control character \\x1b: "fine\\nnot \\x1b fine"',
        "take it out: readers do not see it, and a model reads it as tokens of its own",
        id="note-with-escape",
    ),
    pytest.param(
        HEAD + "extra = 5\n",
        "spec.toml:7: extra is a number, not a table",
        "write a table: extra = { case = 7 }",
        id="extra-a-number",
    ),
    pytest.param(
        HEAD + '[edit.extra]\nold = { json = "nul" }\n',
        "spec.toml:7: extra holds a table with the one key json whose text is not JSON",
        "write plain texts, numbers, lists and tables",
        id="extra-with-broken-json",
    ),
    pytest.param(
        HEAD + "note = 'x'\nextra = " + "{ a = " * 14 + "1" + " }" * 14 + "\n",
        "spec.toml:8: extra nests deeper than 12 levels",
        "write plain texts, numbers, lists and tables",
        id="extra-too-deep",
    ),
    pytest.param(
        HEAD + f"extra = {{ a = 0x{'f' * 5000} }}\n",
        "spec.toml:7: extra holds a number of too many digits",
        "write plain texts, numbers, lists and tables",
        id="extra-number-too-long",
    ),
    pytest.param(
        HEAD + 'extra = { json = "[1]" }\n',
        "spec.toml:7: extra is not a table",
        "write a table: extra = { case = 7 }",
        id="extra-json-of-a-list",
    ),
    pytest.param(
        HEAD + 'generation = [\n  "{} is like {}",\n]\n',
        "spec.toml:8: generation prompt 1 has 2 places {} for the subject",
        "keep one {}: the fact is about one subject, looked up at one place",
        id="generation-with-two-places",
    ),
    pytest.param(
        HEAD + 'references = ["fine", " "]\n',
        "spec.toml:7: reference 2 is empty",
        "write it or take it out",
        id="reference-blank",
    ),
    pytest.param(
        HEAD + 'locality = [\n  { prompt = "The Louvre is in", group = "g" },\n]\n',
        "spec.toml:8: locality probe 1 has a group",
        "take it out: a group counts when one of its answers is right, and locality asks for none",
        id="locality-with-a-group",
    ),
    pytest.param(
        HEAD + 'portability = [\n  { prompt = "a", answer = "b", kind = "hop", group = "g" },\n'
        '  { prompt = "c", answer = "b", group = "g" },\n]\n',
        'spec.toml:9: portability probe 2 is of another kind than the rest of its group "g"',
        "give all probes of a group one kind: together they are one question",
        id="group-of-two-kinds",
    ),
]


@pytest.mark.parametrize(("text", "problem", "hint"), BAD)
def test_a_malformed_spec_has_one_problem_at_its_line_with_a_remedy(text, problem, hint):
    """The whole line is compared: the place, the words, and what to do about it."""
    report = checked(text)
    assert [str(found) for found in report.problems] == [problem]
    assert report.problems[0].hint == hint


WARNED = [
    pytest.param(
        HEAD + 'paraphrases = ["It stands in"]\n',
        "spec.toml:7: paraphrase 1 has no {} and does not name the subject",
        id="paraphrase-by-another-name",
    ),
    pytest.param(
        HEAD + 'paraphrases = ["The Eiffel Tower, yes The Eiffel Tower, is in"]\n',
        "spec.toml:7: paraphrase 1 names the subject 2 times",
        id="paraphrase-names-the-subject-twice",
    ),
    pytest.param(
        HEAD + '[[edit]]\nsubject = "The Eiffel Tower"\nrelation = "{} is made of"\ntarget_new = "wood"\n',
        'spec.toml:7: shares the subject "The Eiffel Tower" with "the-eiffel-tower-is-in" at spec.toml:3',
        id="two-facts-of-one-subject",
    ),
    pytest.param("version = 1\n", "spec.toml:1: declares no edit", id="no-edit"),
]


@pytest.mark.parametrize(("text", "warning"), WARNED)
def test_what_may_be_meant_is_a_warning(text, warning):
    """A warning keeps no edit from being loaded."""
    report = checked(text)
    assert [str(found) for found in report.warnings] == [warning]
    assert all(found.hint for found in report.warnings)
    assert load([FILE]) == report.edits


def test_one_edit_may_lack_everything():
    """Each missing field is named, all at the line of the header."""
    assert [str(found) for found in checked("version = 1\n\n[[edit]]\n").problems] == [
        "spec.toml:3: subject is missing",
        "spec.toml:3: relation is missing",
        "spec.toml:3: target_new is missing",
    ]


def test_all_problems_of_all_files_come_at_once_by_file_and_line():
    """Nobody mends a file to learn of the next mistake in it."""
    Path("b.toml").write_text(
        'version = 1\n[[edit]]\nsubjct = "Rome"\nsubject = "Rome "\nrelation = "It is in"\ntarget_new = 7\n'
        'paraphrases = [\n  "{} {}",\n]\nlocality = [\n  "Rome is old",\n  { prompt = "x", weight = 1 },\n]\n'
    )
    Path("a.toml").write_text(HEAD.replace("version = 1", ""))
    Path("c.toml").write_text(HEAD.replace("Rome", "Oslo"))
    report = check([Path("."), Path("missing.toml"), Path("a.toml")])
    assert [str(found) for found in report.problems] == [
        "a.toml:1: version is missing",
        'b.toml:3: unknown key "subjct"',
        'b.toml:4: subject begins or ends with a space: "Rome "',
        "b.toml:5: relation has no place {} for the subject",
        "b.toml:6: target_new is a number, not a string",
        "b.toml:8: paraphrase 1 has 2 places {} for the subject",
        'b.toml:11: locality probe 1 is about the subject: "Rome is old"',
        'b.toml:12: unknown key "weight" in locality probe 2',
        'c.toml:3: contradicts "the-eiffel-tower-is-in" at a.toml:3 ("Rome" -> "Oslo")',
        "missing.toml:1: no such file",
    ]
    with pytest.raises(InvalidInput, match="10 problems in 4 files") as caught:
        load([Path("."), Path("missing.toml")])
    assert caught.value.problems == report.problems


def test_edits_without_a_problem_of_their_own_are_reported_beside_the_problems():
    """A list of specs can show the good ones while one is being written."""
    report = checked(HEAD + ANOTHER.replace("{} is in", "in"))
    assert [found.id for found in report.edits] == ["the-eiffel-tower-is-in"]
    assert len(report.problems) == 1


def test_edits_with_a_problem_of_their_own_are_reported_as_far_as_they_could_be_read():
    """In the files' order, each with its place; what another edit disputes is no problem of one's own."""
    Path("a.toml").write_text(HEAD + ANOTHER.replace('"Oslo"', "7") + "\n[[edit]]\n")
    Path("b.toml").write_text(HEAD.replace("Rome", "Oslo") + ANOTHER.replace("{} is in", "in"))
    report = check([Path("b.toml"), Path("a.toml")])
    found = [(edit.file, edit.line, edit.subject, edit.relation, edit.target_new) for edit in report.faulty]
    assert found == [
        ("b.toml", 8, "The Louvre", "in", "Oslo"),
        ("a.toml", 8, "The Louvre", "{} is in", ""),
        ("a.toml", 13, "", "", ""),
    ]
    assert [edit.file for edit in report.edits] == ["b.toml", "a.toml"]
    assert any("contradicts" in problem.message for problem in report.problems)


SOME = [
    HEAD,
    HEAD.replace("Rome", "Oslo"),
    HEAD + ANOTHER,
    HEAD + 'locality = ["The Louvre is in"]\n',
    HEAD.replace("{} is in", "is in") + ANOTHER,
    HEAD.replace("subject", "subjct"),
    "version = \n",
    "version = 1\n",
    "\xe9",
]
"""Files that contradict each other, are wrong by themselves, or cannot be read."""
states = st.dictionaries(st.sampled_from(["a.toml", "b.toml", "c.toml"]), st.sampled_from(SOME))


def disk_holds(files):
    """Make the files of the folder these; a file that is one already is not touched."""
    for path in set(Path().iterdir()) - {Path(name) for name in files}:
        path.unlink()
    for name, text in files.items():
        if not Path(name).exists() or Path(name).read_bytes() != text.encode("latin-1"):
            Path("new").write_bytes(text.encode("latin-1"))
            Path("new").replace(name)


@quick
@given(st.lists(states, max_size=6))
def test_a_shelf_tells_what_a_first_look_tells(history):
    """After any changes of files: what edits disputed before does not stick to those that were kept."""
    shelf, places = Shelf(), [Path("."), Path("c.toml")]
    for files in history:
        disk_holds(files)
        assert shelf.check(places) == check(places)


@quick
@given(states, states)
def test_a_shelf_tells_what_would_be_told_of_other_texts(files, typed):
    """Of files that are there and of new ones; and afterwards of the disk again."""
    typed = {name: text for name, text in typed.items() if text.isascii()}
    shelf, places = Shelf(), [Path("."), Path("c.toml")]
    disk_holds(files)
    before = shelf.check(places)
    told = shelf.check(places, typed)
    assert shelf.check(places) == before
    disk_holds(files | typed)
    assert told == check(places)


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read, in order."""
    names, plain = [], spec.read
    monkeypatch.setattr(spec, "read", lambda path, problems: names.append(str(path)) or plain(path, problems))
    return names


def test_a_shelf_reads_only_what_changed(reads):
    """By time, size or inode; a file asked by another name is read under it, and one that was away is read again."""
    one, two = Path("one.toml"), Path("two.toml")
    one.write_text(HEAD)
    two.write_text(ANOTHER)
    shelf = Shelf()

    def read_by(*paths, **more):
        reads.clear()
        report = shelf.check(paths or [one, two], **more)
        again = [*reads]
        assert report == Shelf().check(paths or [one, two], **more)
        return again

    assert read_by() == ["one.toml", "two.toml"]
    assert read_by() == []
    stamp = one.stat()
    Path("other").write_text(HEAD.replace("Rome", "Oslo"))
    os.utime("other", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    Path("other").replace(one)
    assert (one.stat().st_mtime_ns, one.stat().st_size) == (stamp.st_mtime_ns, stamp.st_size)
    assert read_by() == ["one.toml"]
    os.utime(two, ns=(0, 0))
    assert read_by() == ["two.toml"]
    assert read_by(texts={"one.toml": HEAD + ANOTHER, "two.toml": "version = 1\n"}) == []
    assert read_by() == []
    assert read_by(one, two.absolute()) == [str(two.absolute())]
    two.rename("away")
    assert read_by() == ["two.toml"]
    Path("away").rename(two)
    assert read_by() == ["two.toml"]
    assert read_by(one) == []
    assert read_by() == ["two.toml"], "what a check is not asked for is not kept"


def test_a_shelf_stops_at_too_many_problems_each_time(reads):
    """The files after them are not read, and those told of as read stay so."""
    many = "version = 1\n" + "".join(f"[[edit]]\nsubject = 'S{i}'\nrelation = 'x'\n" for i in range(600))
    for name in "abc":
        Path(f"{name}.toml").write_text(many)
    shelf = Shelf()
    first = shelf.check([Path(".")])
    assert reads == ["a.toml"]
    assert shelf.check([Path(".")]) == first == check([Path(".")])
    assert reads == ["a.toml", "a.toml"]


def test_a_shelf_takes_a_text_for_a_folder_that_is_not_there_yet():
    """The first edit of a project is checked before its folder is made."""
    report = Shelf().check([Path("specs")], {"specs/new.toml": HEAD})
    assert ([edit.file for edit in report.edits], report.problems) == (["specs/new.toml"], ())
    assert [found.message for found in Shelf().check([Path("specs")]).problems] == ["no such file"]


def test_what_cannot_be_read_is_a_problem():
    """A folder by the name of a file, other bytes than UTF-8, too large a file."""
    Path("folder.toml").mkdir()
    assert [str(found) for found in check([Path(".")]).problems] == ["folder.toml:1: cannot be read: Is a directory"]
    assert str(checked(b"version = 1\n# caf\xe9\n").problems[0]) == "spec.toml:2: not UTF-8 text: byte 0xe9"


def test_too_much_is_refused(monkeypatch):
    """Limits on the size of a file and on its edits, here lowered."""
    monkeypatch.setattr(spec, "MAX_EDITS", 1)
    assert [str(found) for found in checked(HEAD + ANOTHER).problems] == [
        "spec.toml:3: the file has 2 edits, at most 1 are allowed"
    ]
    monkeypatch.setattr(spec, "MAX_BYTES", 100)
    assert [str(found) for found in check([FILE]).problems] == ["spec.toml:1: is larger than 0 MB"]
    monkeypatch.setattr(spec, "MAX_FILES", 2)
    for name in "abc":
        Path(f"{name}.toml").touch()
    assert [str(found) for found in check([Path(".")]).problems] == [".:1: makes more than 2 spec files"]
    assert len(check([Path("a.toml"), Path("b.toml"), Path("b.toml")]).problems) == 2


def test_of_many_problems_the_first_thousand_are_told():
    """Then reading ends, in one file and over several; so do warnings, without ending anything."""
    many = "version = 1\n" + "".join(f"[[edit]]\nsubject = 'S{i}'\nrelation = 'x'\n" for i in range(5000))
    found = checked(many).problems
    assert len(found) == 1001
    assert sum("has more than 1000 problems" in one.message for one in found) == 1
    Path("other.toml").write_text(many)
    Path("third.toml").write_text(many)
    found = check([FILE, Path("other.toml"), Path("third.toml")]).problems
    assert len(found) == 1002
    assert found[0].message == "was not read, for there are more than 1000 problems before it"
    alike = edit().partition("\n")[2]
    twice = "version = 1\n" + "".join(alike.replace("is in", f"is in {i}") for i in range(1500))
    report = checked(twice)
    assert (len(report.edits), len(report.problems), len(report.warnings)) == (1500, 0, 1001)
    assert "no more are told" in report.warnings[-1].message


def test_a_text_too_long_is_told_of_once_and_not_looked_into():
    """A place for the subject in it would be filled with another megabyte each time."""
    text = edit(subject="a" * 1_000_000, relation="{}" * 500_000)
    assert [found.message[:40] for found in checked(text).problems] == [
        "subject has 1000000 characters, at most ",
        "relation has 1000000 characters, at most",
    ]


def test_a_path_that_no_file_has_is_a_missing_file():
    """A NUL ends a path for the operating system."""
    assert [found.message for found in check([Path("a\0b.toml")]).problems] == ["no such file"]


@pytest.mark.parametrize("c", "\u061c\u200e\u200f\xad\u2060\u180e\U000e0041\ufff9")
def test_characters_that_nobody_sees_or_that_turn_the_direction_are_refused(c):
    """Joiners are not: Persian and Hindi words are spelled with them."""
    [found] = checked(edit(subject=f"To{c}wer")).problems
    assert "subject contains a" in found.message and found.message.isprintable()
    assert not checked(edit(subject="\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")).problems


def test_an_empty_folder_is_warned_of():
    """An empty folder is a desired state, but seldom the one that is meant."""
    report = check([Path(".")])
    assert (report.edits, report.problems) == ((), ())
    assert [str(found) for found in report.warnings] == [".:1: holds no *.toml file"]


def test_a_byte_order_mark_and_windows_line_ends_are_read():
    """Files from Windows editors have the same lines."""
    text = "\ufeff" + (HEAD + 'tags = [""]\n').replace("\n", "\r\n")
    assert [str(found) for found in checked(text).problems] == ["spec.toml:7: tag 1 is empty"]


def test_lines_are_found_through_everything_toml_allows():
    """Comments, brackets in strings, multi-line strings, quoted and dotted keys, nested tables."""
    text = '''# [[edit]]
"version" = 1
[[ edit ]] # one ] [ " \'
subject = 'C:\\' # literal
relation = "{} # is \\" in [[edit]]"
target_new = "Rome"
note = """
[[edit]]
subject = "no" ""\\"""""
source = \'\'\'
it's ''quoted'' \'\'\'\'\'
tags = [ "a", # one
  "b", """c]""",
  "", ]
[[edit]]
"sub\\u006aect" = "Oslo"
  'relation' = "{} is in"
target_new = "Spain"
locality = [ "x [", { prompt = "y }", "answer" = [ "1", "2" ] },
  { prompt = "z", answer = [ "]",
     7 ] }, 1979-05-27 07:32:00,
  { prompt.text = "w" } ]
odd.key = 1.5
'''
    assert [str(found) for found in checked(text).problems] == [
        "spec.toml:14: tag 4 is empty",
        "spec.toml:21: answer 2 of locality probe 3 is a number, not a string",
        "spec.toml:21: locality probe 4 is a date or time, not a string or a table",
        "spec.toml:22: prompt of locality probe 5 is a table, not a string",
        'spec.toml:23: unknown key "odd"',
    ]


def test_a_full_spec_is_read():
    """Every field, with a probe as text, as a table, with one answer and with several."""
    report = checked(
        """version = 1
method = "memit"

[[edit]]
id = "tower"
subject = "The Eiffel Tower"
relation = "{} is in"
target_new = "Rome"
target_true = "Paris"
paraphrases = ["{} stands in", "Where is The Eiffel Tower? In"]
locality = ["The Louvre is in", { prompt = "{} is made of", answer = "iron" }]
portability = [{ prompt = "{} is in the country of", answer = ["Italy", "Italia"], kind = "reasoning", group = "g" }]
source = "a book"
note = ""
tags = ["landmarks"]
generation = ["{} looks", "{} looks"]
references = [" Rome is old.\\n"]
essence = "A tower of iron."

[edit.extra]
case = 7
when = 2020-01-01
"the old" = { json = "null" }
list = [1, "a", 2.5, { b = true }]
"""
    )
    assert report.problems == report.warnings == ()
    [found] = report.edits
    assert found == Edit(
        id="tower",
        subject="The Eiffel Tower",
        relation="{} is in",
        target_new="Rome",
        target_true="Paris",
        paraphrases=("{} stands in", "Where is The Eiffel Tower? In"),
        locality=(Probe(prompt="The Louvre is in"), Probe(prompt="{} is made of", answer=("iron",))),
        portability=(Probe(prompt="{} is in the country of", answer=("Italy", "Italia"), kind="reasoning", group="g"),),
        source="a book",
        tags=("landmarks",),
        generation=("{} looks", "{} looks"),
        references=(" Rome is old.\n",),
        essence="A tower of iron.",
        extra='{"case":7,"list":[1,"a",2.5,{"b":true}],"the old":null,"when":"2020-01-01"}',
        method="memit",
        file="spec.toml",
        line=4,
    )
    assert found.prompt == "The Eiffel Tower is in"
    assert found.paraphrase_prompts == ("The Eiffel Tower stands in", "Where is The Eiffel Tower? In")
    assert found.locality_prompts == ("The Louvre is in", "The Eiffel Tower is made of")
    assert found.portability_prompts == ("The Eiffel Tower is in the country of",)
    assert found.generation_prompts == ("The Eiffel Tower looks",) * 2
    assert Edit.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()
    assert not {"file", "line"} & found.to_json().keys()


@pytest.mark.parametrize("template", ["{| {} is {0}", "{{x}} {} }{", "%s {} {subject} {!r}", "{{}}"])
def test_other_braces_are_ordinary_characters(template):
    """Only {} is the subject's place, as it is written, whatever stands around it."""
    report = checked(f'version = 1\n[[edit]]\nsubject = "{{|"\nrelation = "{template}"\ntarget_new = "{{0}}"\n')
    if not template.startswith("{|"):
        assert report.problems == ()
        assert report.edits[0].prompt == template.replace("{}", "{|")
    assert fill(template, "{0}") == template.replace("{}", "{0}")


@pytest.mark.parametrize(
    ("subject", "relation", "name"),
    [
        ("The Eiffel Tower", "{} is located in the city of", "the-eiffel-tower-is-located-in-the-city-of"),
        ("Café Müller", "In {}'s words,", "cafe-muller-in-s-words"),
        ("x" * 100, "{} is", "x" * 60),
        ("埃菲尔铁塔", "{} is in", "1e889b3b-is-in"),
    ],
)
def test_an_edit_without_an_id_is_named_by_its_words(subject, relation, name):
    """Lower-case Latin words, at most 60 characters; other scripts count by a hash."""
    [found] = checked(
        f'version = 1\n[[edit]]\nsubject = "{subject}"\nrelation = "{relation}"\ntarget_new = "x"\n'
    ).edits
    assert found.id == name


def test_the_subject_is_looked_for_in_whole_words():
    """A subject inside a longer word is not named there, unless its script sets no spaces."""
    assert checked(edit("Art", "{} Garfunkel's Artist is") + 'locality = ["Arthur is"]\n').problems == ()
    assert len(checked(edit("巴黎", "{}位于") + 'locality = ["在巴黎的"]\n').problems) == 1


@pytest.mark.parametrize(
    ("change", "weights", "notes"),
    [
        ({"subject": "Rome"}, True, False),
        ({"relation": "{} lies in"}, True, False),
        ({"target_new": "Oslo"}, True, False),
        ({"method": "memit"}, True, False),
        ({"target_true": "Bonn"}, False, True),
        ({"paraphrases": ("{} lies in",)}, False, True),
        ({"locality": (Probe(prompt="a"),)}, False, True),
        ({"locality": (Probe(prompt="x", answer=("y",)),)}, False, True),
        ({"portability": (Probe(prompt="x", answer=("y",)),)}, False, True),
        ({"source": "a book"}, False, True),
        ({"note": "see there"}, False, True),
        ({"tags": ("a",)}, False, True),
        ({"generation": ("{} a",)}, False, True),
        ({"references": ("a",)}, False, True),
        ({"essence": "a"}, False, True),
        ({"extra": '{"a":1}'}, False, True),
        ({"portability": (Probe(prompt="x", answer=("y",), group="g"),)}, False, True),
        ({"id": "other"}, False, False),
        ({"file": "other.toml", "line": 9}, False, False),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_fingerprints_tell_what_a_change_touches(change, weights, notes):
    """A change of a weights field needs a new edit of the model; a change of a note does not."""
    before = Edit(id="a", subject="Paris", relation="{} is in", target_new="Rome", locality=(Probe(prompt="x"),))
    after = before.model_copy(update=change)
    assert (before.weights_fingerprint != after.weights_fingerprint) is weights
    assert (before.notes_fingerprint != after.notes_fingerprint) is notes
    assert re.fullmatch("[0-9a-f]{16}", after.weights_fingerprint)


def test_a_fingerprint_is_the_same_in_every_release():
    """Stores keep fingerprints, so the bytes they are taken over are a promise."""
    found = Edit(subject="Café", relation="{} is in", target_new="Rome")
    assert found.weights_fingerprint == "6c66a90154034883"
    assert found.notes_fingerprint == "8431644438e7755b"
    probed = found.model_copy(update={"locality": (Probe(prompt="x"),), "portability": (Probe(prompt="y"),)})
    assert probed.notes_fingerprint == "d4264d65241f8b02"


def test_what_earlier_releases_stored_is_read_and_written_as_it_was():
    """Fields that came later stay out while they are empty, and are there when they are not."""
    old = Edit(subject="Rome", relation="{} is in", target_new="Spain", portability=(Probe(prompt="x", answer=("y",)),))
    later = {"generation", "references", "essence", "extra"}
    assert not later & old.to_json().keys()
    assert old.to_json()["portability"] == [{"prompt": "x", "answer": ["y"], "kind": ""}]
    probe = Probe(prompt="x", answer=("y",), group="g")
    new = old.model_copy(update={"essence": "a", "extra": "{}", "portability": (probe,)})
    assert later & new.to_json().keys() == {"essence", "extra"}
    assert new.to_json()["portability"][0]["group"] == "g"
    assert Edit.from_json(new.to_json()) == new


@pytest.mark.parametrize("extra", ["x", "[1]", "1", "[" * 100_000])
def test_an_edit_from_elsewhere_has_a_table_for_extra_or_is_refused(extra):
    """Who reads an edit relies on it; a plan or a store that was tampered with is told so."""
    with pytest.raises(ValueError, match="extra"):
        Edit.from_json({"subject": "a", "relation": "{}", "target_new": "b", "extra": extra})


PIECES = [
    "[[edit]]\n",
    "[edit]\n",
    "version = 1\n",
    "subject = ",
    "edit",
    ".",
    '"',
    '"""',
    "'",
    "'''",
    "{",
    "}",
    "[",
    "]",
]
PIECES += [
    "{}",
    ",",
    "\n",
    "#",
    "=",
    "locality = ",
    "1",
    " ",
    "\\",
    "\\u001b",
    "true",
    "1979-05-27",
    '"a"',
    "prompt = ",
    "\r\n",
]


@quick
@given(
    st.binary(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=40).map(lambda some: "".join(some).encode())
)
def test_no_file_makes_checking_raise(data):
    """Whatever stands in a file, it is reported, at a line that the file has."""
    report = checked(data)
    for found in report.problems + report.warnings:
        assert 1 <= found.line <= data.count(b"\n") + 1
        assert found.message.isprintable()


KEYS = ["subject", "relation", "target_new", "target_true", "paraphrases", "locality", "portability", "tags", "id", "x"]
values = st.recursive(
    st.text(max_size=8)
    | st.sampled_from(["{} is in", "Rome", "{} {}"])
    | st.integers(-9, 9)
    | st.booleans()
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "answer", "kind", "y z"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@quick
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), values), max_size=3))
def test_no_values_make_checking_raise(tables):
    """Every type at every place of valid TOML."""
    FILE.write_text(tomlkit.dumps({"version": 1, "edit": tables}), newline="")
    report = check([FILE])
    assert all((found.message + found.hint).isprintable() for found in report.problems + report.warnings)


def ways(value, way=()):
    """The way to the value and to everything inside it."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {way}.union(*(ways(item, (*way, key)) for key, item in inside))


@quick
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=4), values, max_size=4))
def test_every_value_of_a_file_has_a_line(data):
    """The scanner and the TOML parser see the same keys, items and tables."""
    text = tomlkit.dumps(data)
    assert set(spec.locate(text)) == ways(tomli.loads(text))


def test_visible_text_has_no_character_that_acts():
    """Escapes, direction overrides and invisible characters are spelled out; long text is cut."""
    assert visible("\x1b[31m\u202e\u200b\ufeff\u2028\n") == r"\x1b[31m\u202e\u200b\ufeff\u2028\n"
    assert visible("[bold]Zürich[/] 埃菲尔") == "[bold]Zürich[/] 埃菲尔"
    assert len(visible("a" * 100)) == 60
    assert len(visible("\x1b" * 100)) == 60


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="the samples of real data sets are not here")
@pytest.mark.parametrize("name", ["ansi_and_markup_subject", "control_characters"])
def test_no_control_character_of_a_data_set_reaches_a_message(name):
    """Subjects from real formats, used as subject, target, probe and key: each is told, none is shown raw."""
    records = [record["requested_rewrite"] for record in json.loads((SAMPLES / f"{name}.json").read_text())]
    for record in records:
        subject = record["subject"]
        table = {"subject": subject, "relation": subject + " is", "target_new": subject, subject: 1, "id": subject}
        table |= {"paraphrases": ["{} {} " + subject], "locality": [subject + " is"]}
        FILE.write_text(tomlkit.dumps({"version": 1, "edit": [table, {**table, "id": "b"}]}))
        report = check([FILE])
        assert report.problems
        assert all((str(found) + found.hint).isprintable() for found in report.problems + report.warnings)


def conforms(value, schema, root):
    """Whether the value is of the schema, by the few words of JSON Schema that ours uses."""
    schema = root["definitions"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "anyOf" in schema:
        return any(conforms(value, one, root) for one in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema.get("maxLength", len(value))
    if schema["type"] == "array":
        return isinstance(value, list) and all(conforms(item, schema["items"], root) for item in value)
    if "properties" not in schema:
        return isinstance(value, dict)
    fields = schema["properties"]
    return (
        isinstance(value, dict)
        and value.keys() >= set(schema["required"])
        and all(key in fields and conforms(item, fields[key], root) for key, item in value.items())
    )


def test_the_schema_says_what_is_read():
    """A full spec conforms; unknown keys, wrong types and missing fields do not; every field is described."""
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    good = {"subject": "Rome", "relation": "{} is in", "target_new": "Spain"}
    full = {"id": "a", "locality": ["x", {"prompt": "y", "answer": "z"}], "tags": ["t"], "note": ""}
    full |= {"portability": [{"prompt": "y", "answer": ["z", "w"], "kind": "k"}], "paraphrases": ["{} x"], **good}
    assert conforms({"version": 1, "method": "memit", "edit": [good, full]}, schema, schema)
    full |= {"generation": ["{} x"], "references": ["y"], "essence": "z", "extra": {"any": [1, {"thing": True}]}}
    wrong = [{"subject": 1}, {"locality": [1]}, {"locality": [{"answer": "x"}]}, {"tags": "t"}, {"file": "f"}]
    wrong += [{"extra": "x"}, {"essence": ["x"]}, {"generation": "x"}, {"references": [1]}]
    wrong += [{"line": 1}, {"method": "memit"}, {"subject": "x" * 201}, {"portability": [{"prompt": "x", "k": 1}]}]
    for change in wrong:
        assert not conforms({"version": 1, "edit": [good | change]}, schema, schema), change
    assert not conforms({"version": 2}, schema, schema)
    assert not conforms({"edit": [good]}, schema, schema)
    for name in ("Edit", "Probe"):
        fields = schema["definitions"][name]["properties"]
        assert all(field["description"] for field in fields.values())
    assert set(schema["definitions"]["Edit"]["properties"]) == set(Edit.model_fields) - {"method", "file", "line"}


PAGE = (ROOT / "docs/specs.md").read_text()
BLOCKS = re.findall(r"^```toml( wrong)?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", PAGE, re.M | re.S)


@pytest.mark.parametrize("text", [text for wrong, text, _ in BLOCKS if not wrong])
def test_every_spec_on_the_page_is_good(text):
    """Each TOML block of docs/specs.md loads without a problem or a warning."""
    report = checked(text)
    assert report.problems == report.warnings == ()
    assert report.edits


@pytest.mark.parametrize(("text", "told"), [(text, told) for wrong, text, told in BLOCKS if wrong])
def test_every_mistake_on_the_page_is_told_in_the_words_of_the_page(text, told):
    """Each wrong block of docs/specs.md is followed by what is said about it."""
    lines = [line for found in checked(text).problems for line in (str(found), f"  hint: {found.hint}")]
    assert lines == told.splitlines()


def test_the_page_names_every_field():
    """One row of its table for each key."""
    for name in set(Edit.model_fields) - {"file", "line"} | set(Probe.model_fields):
        assert f"| `{name}`" in PAGE, name
