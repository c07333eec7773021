"""The rows of one run folder."""

import json

import pytest

from rect_lightning.experiments.table import measurements
from tests.reports.samples import write_run


@pytest.mark.parametrize(("mode", "source"), [("sequential", "change"), ("single", "alone")])
def test_what_one_operation_alone_changed_is_no_change_since_the_clean_model(tmp_path, mode, source):
    told = json.loads((write_run(tmp_path) / "provenance.json").read_text())
    (tmp_path / "provenance.json").write_text(json.dumps({**told, "mode": mode}))
    rows = [row for row in measurements(tmp_path) if row["name"] == "6/above_0.077"]
    assert [(row["edits"], row["source"], float(row["value"])) for row in rows] == [
        (4, source, 0.11),
        (8, source, 0.12),
    ]


def test_a_run_that_has_just_begun_has_no_rows(tmp_path):
    (tmp_path / "side_effects.csv").write_text("edits,ta")
    assert list(measurements(tmp_path)) == []


def test_a_table_of_another_kind_is_refused(tmp_path):
    (tmp_path / "side_effects.csv").write_text("edits,value\n1,2\n")
    with pytest.raises(ValueError, match=r"side_effects\.csv: the last columns should be edits, task"):
        list(measurements(tmp_path))
