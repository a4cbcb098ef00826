"""`mvcodec evaluate` says in text and in JSON what its tables hold, and refuses what makes no curve."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from .conftest import Cli

OPTIONS = ("--qualities", "10,40,70,100", "--peers", "jpeg", "--out", "report")


def test_evaluate_reports_in_text_and_in_json(cli: Cli, scene: Path) -> None:
    text = cli("evaluate", scene, *OPTIONS)
    assert text.code == 0, text.err
    assert b"joint over separate" in text.out
    assert b"akima" in text.out
    outcome = cli("evaluate", scene, *OPTIONS, "--json", "--scenes", "C1", "--limit-views", 1, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    (record,) = outcome.records
    assert record["model"] == "tiny"
    assert record["scenes"] == ["C1"]
    assert record["estimate"]["files"] == 4
    assert {d["anchor"] for d in record["mean_bd_rates"]} == {"jpeg", "mvcodec separate"}
    with Path("report", "curves.csv").open(newline="") as file:
        assert {row["codec"] for row in csv.DictReader(file)} == {"jpeg", "mvcodec separate", "mvcodec joint"}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--qualities", "10,20,thirty"), "use numbers from 0 to 100"),
        (("--qualities", "10,20,30,101"), "use numbers from 0 to 100"),
        (("--qualities", "10,20,30", "--peers", "none"), "needs at least 4"),
        (("--peers", "jpeg,gif"), "--peers gif: use some of jpeg"),
        (("--scenes", "nowhere"), "has no scene nowhere"),
    ],
)
def test_what_makes_no_curve_is_refused(cli: Cli, scene: Path, options: tuple[str, ...], sentence: str) -> None:
    outcome = cli("evaluate", scene, "--out", "report", *options)
    assert outcome.code == 2
    assert sentence in outcome.err
