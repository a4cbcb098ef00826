"""`mvcodec evaluate` says in text and in JSON what its tables hold, and refuses what makes no curve."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image as pil

from .conftest import Cli

OPTIONS = ("--qualities", "10,40,70,100", "--peers", "jpeg", "--out", "report")


def test_evaluate_reports_in_text_and_in_json(cli: Cli, scene: Path) -> None:
    text = cli("evaluate", scene, *OPTIONS)
    assert text.code == 0, text.err
    assert b"joint over separate" in text.out
    assert b"akima" in text.out
    with Path("report", "curves.csv").open(newline="") as file:
        assert {row["scene"] for row in csv.DictReader(file)} == {"0", "1", "mean"}  # the rig's two instants
    outcome = cli("evaluate", scene, *OPTIONS, "--json", "--scenes", "0", "--limit-views", 1, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    (record,) = outcome.records
    assert record["model"] == "tiny"
    assert record["scenes"] == ["0"]
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


def test_a_report_below_the_pictures_is_no_scene(cli: Cli, scene: Path) -> None:
    for frame in scene.glob("*/00000001.png"):
        frame.unlink()
    args = ("evaluate", scene, *OPTIONS[:-1], scene / "report", "--limit-views", 1, "--json")
    assert [cli(*args).records[0]["scenes"] for _ in range(2)] == [["0"], ["0"]]
    outcome = cli(*args[:-4], scene)
    assert outcome.code == 2
    assert "is the folder of the pictures" in outcome.err


@pytest.mark.parametrize("args", [("evaluate", "bad", "--out", "report"), ("demo", "bad"), ("bench", "bad")])
def test_a_bad_picture_is_named_and_no_option_advised_that_is_not_there(cli: Cli, args: tuple[str, ...]) -> None:
    path = Path("bad/a.png")
    path.parent.mkdir()
    pil.new("RGBA", (8, 8), (1, 2, 3, 4)).save(path)
    outcome = cli(*args)
    assert outcome.code == 3
    assert "bad/a.png: has an alpha channel, which is not coded\n" in outcome.err
    for data, sentence in ((b"hello", "is not a picture"), (b"P6 12000 12000 255\n", "over the cap of 134217728\n")):
        path.write_bytes(data)
        outcome = cli(*args)
        assert outcome.code == 3
        assert "bad/a.png: " in outcome.err
        assert sentence in outcome.err
