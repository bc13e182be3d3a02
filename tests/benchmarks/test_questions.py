"""Every question keeps the protocol, and a new one is one file."""

import inspect
import subprocess
import sys

import pytest

from benchmarks import __main__, measure, process, record, report
from benchmarks import questions as folder
from benchmarks.questions import questions

TOY = '''"""How many are there?

    python -m benchmarks measure toy --upto 3
"""

from benchmarks.tables import markdown, source

QUESTION = "How many are there?"
ORDER = 100


def add_options(parser):
    parser.add_argument("--upto", type=int, default=2)


def settings(args):
    return {"upto": args.upto}


def measure(args):
    rows = []
    for i in range(args.upto):
        rows.append({"count": i})
        yield rows


def complaints(rows):
    return [f"too many: {row['count']}" for row in rows if row["count"] > 3]


def sections(results):
    result = results.get("toy")
    table = ["", "count"], [["toy", str(row["count"])] for row in result["rows"]] if result else []
    return ["## Toys\\n", markdown(table), source(result)] if result else []


def draw(result, path):
    path.write_bytes(b"a picture")
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A file in the folder of questions, and nothing else."""
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "toy.py").write_text(TOY)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path / "questions")])
    yield tmp_path
    sys.modules.pop("benchmarks.questions.toy", None)


def test_a_new_question_is_one_file(toy):
    assert list(questions())[-1] == "toy"
    assert report.readme(toy).count("##") == 0  # nothing was measured yet
    measure.main(["toy", "--upto", "3", "--out", str(toy)])
    assert [row["count"] for row in record.read(toy / "toy.jsonl")["rows"]] == [0, 1, 2]
    assert (toy / "toy.png").read_bytes() == b"a picture"
    assert "## Toys\n\n|  | count |\n| --- | ---: |\n| toy | 0 |\n" in report.readme(toy)


def test_a_complaint_fails_the_command(toy, capsys):
    with pytest.raises(SystemExit, match="1"):
        measure.ask("toy", ["--upto", "5", "--out", str(toy)])
    assert "too many: 4" in capsys.readouterr().err


@pytest.mark.parametrize("name", questions())
def test_a_question_keeps_the_protocol(name, tmp_path):
    question = questions()[name]
    assert question.QUESTION.endswith("?")
    assert f"python -m benchmarks measure {name}" in question.__doc__
    assert question.sections(record.Results(tmp_path)) == []
    assert inspect.isgeneratorfunction(question.measure)
    if hasattr(question, "in_short"):
        assert question.in_short(record.Results(tmp_path)) == []
        assert question.SHORT_ORDER


def test_no_two_questions_have_one_place():
    for place in ("ORDER", "SHORT_ORDER"):
        places = [getattr(each, place) for each in questions().values() if hasattr(each, place)]
        assert len(places) == len(set(places))


def test_several_are_asked_each_in_its_own_process_and_then_reported(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command[3:]))
    measure.main(["drift", "scale", "--out", str(tmp_path)])
    measured = [["measure", name, "--out", str(tmp_path)] for name in ("drift", "scale")]
    assert ran == [*measured, ["report", "--results", str(tmp_path)]]
    ran.clear()
    measure.main([])
    assert [words[1] for words in ran][:2] == ["memory_depth", "step_time"]
    assert "camvid" not in [words[1] for words in ran]  # it needs images that are not here


def test_an_unknown_name_or_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        measure.main(["drfit"])
    assert "'drfit'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="python -m benchmarks measure"):
        __main__.main(["measrue"])


def values(upto):
    for i in range(upto):
        if i == 2:
            raise SystemExit(3)
        print("words of a library")
        yield {"i": i}


def test_a_process_hands_over_what_it_found_until_it_died():
    assert process.run(values, 2) == ([{"i": 0}, {"i": 1}], "")
    assert process.run(values, 5) == ([{"i": 0}, {"i": 1}], "the process ended with 3")
