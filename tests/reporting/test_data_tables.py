import pytest

from mftcoder_coba.reporting.data_tables import data_tables, print_data


def cells(table, row):
    return dict(zip(table.columns[1:], next(found for found in table.rows if found[0] == row)[1:], strict=True))


def test_every_task_and_split_has_its_samples_and_lengths(make_accounting):
    samples, lengths, mixture = data_tables(make_accounting(("qa", "code")))
    assert cells(samples, "code train") == {
        "read": "1,207",
        "skipped": "1",
        "too long": "2",
        "used": "1,204",
        "tokens": "887,001",
        "supervised %": "50.0",
    }
    assert cells(lengths, "qa valid") == {"64": "1,000", "128": "199"}
    assert cells(mixture, "qa")["fewest-most"] == "20-23"


def test_bins_of_different_tasks_share_their_columns(make_accounting):
    data = make_accounting(("qa", "code"))
    data["tasks"]["code"]["train"]["lengths"] = [[256, 5]]
    lengths = data_tables(data)[1]
    assert cells(lengths, "code train") == {"64": "0", "128": "0", "256": "5"} and cells(lengths, "qa train")["256"] == "0"


@pytest.mark.parametrize("known", [{}, {"tasks": {}}, {"tasks": {}, "mixture": None}])
def test_what_is_not_known_makes_no_table(known):
    assert data_tables(known) == []


def test_the_first_skipped_lines_are_printed(capsys, make_accounting):
    data = make_accounting(("qa",))
    data["tasks"]["qa"]["train"]["skipped"] = [{"file": "[b]a.jsonl", "line": n, "reason": "not JSON"} for n in range(1, 14)]
    print_data(data)
    printed = capsys.readouterr().out
    assert "skipped [b]a.jsonl:10: not JSON" in printed and "a.jsonl:11" not in printed and "and 3 more skipped lines of qa/train" in printed
