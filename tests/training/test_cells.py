"""Stage `cells`: only its two networks learn, on what the codec decodes, and a stopped run goes on as if it had not."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as pil

from mvcodec.codec import decode_set, encode_image
from mvcodec.errors import UsageError
from mvcodec.images import Image
from mvcodec.training import cells
from mvcodec.training.config import TrainConfig
from mvcodec.training.export import export_checkpoint
from mvcodec.training.loop import train
from mvcodec.training.preparation import to_tensor
from mvcodec.weights import load_model
from tests.conftest import smooth_picture


@pytest.fixture
def config(after_single, tmp_path, monkeypatch):
    for name, value in {"WINDOW": 128, "SETS": {False: 3, True: 2}}.items():
        monkeypatch.setattr(cells, name, value)
    return replace(after_single, stage="cells", run_dir=str(tmp_path / "cells"), steps=40, learning_rate=4e-3)


def test_only_the_two_networks_learn_and_the_model_id_stays(config, tmp_path, capsys):
    before = torch.load(config.start_from, weights_only=True)["ema"]
    checkpoint = train(config, progress=False)
    told = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["reading", "decoding", "40", "decoding", "40"]
    after = torch.load(checkpoint, weights_only=True)["ema"]
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert {"cells.alone.last.weight", "cells.helped.last.weight"} <= changed
    assert all(name.startswith(("cells.alone.", "cells.helped.")) for name in changed)
    single = export_checkpoint(config.start_from, tmp_path / "single.safetensors")
    assert export_checkpoint(checkpoint, tmp_path / "told.safetensors") == single
    assert load_model(tmp_path / "told.safetensors").net.cells.helped is not None
    losses = np.loadtxt(checkpoint.parent / "log.csv", delimiter=",", skiprows=1)
    assert losses[:, 0].tolist() == [*range(1, 81)]
    assert losses[30:40, 1].mean() < losses[:10, 1].mean()


def test_lessons_are_of_what_the_decoder_shows(tiny_model, monkeypatch):
    """Two views of one surface: apart and change are as in `_Cells`, and the error is what is then left."""
    seen = []
    net = deepcopy(tiny_model.net)
    wide = smooth_picture(64, 112, seed=5)
    pictures = [np.ascontiguousarray(wide[:, s : s + 64]) for s in (0, 8)]
    estimate = net.cells.estimate(helped=True)
    torch.nn.init.normal_(net.refinement.head[-1].weight, std=0.5)
    estimate.register_forward_pre_hook(lambda _, given: seen.append(given))
    model = replace(tiny_model, net=net)
    files = [encode_image(model, Image(x), 60, camera_id=str(n)) for n, x in enumerate(pictures)]
    decode_set(model, files)
    lessons = list(cells.lessons(net, to_tensor(pictures), [0.6, 0.6], True, np.random.default_rng(0)))
    assert len(lessons) == len(seen) == 2
    for lesson, (told, _, apart, before, change, shown) in zip(lessons, seen, strict=True):
        assert min(change.abs().mean(), shown.abs().mean()) > 0.01
        for name, x in zip(cells.SEEN, (*told, apart, before, change, shown), strict=True):
            found, wanted = (part.float().flatten(1).sort().values for part in (lesson[name], x[0]))
            assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean() + 0.01, name
    energy = [float((lesson["error"].float().square() * lesson["weight"][:, None]).sum()) for lesson in lessons]
    assert all(0.2 < x / 16 < 1.01 for x in energy)  # of all of the error, what these channels hold


def test_it_learns_what_can_be_told():
    """Where the symbol is zero the picture is to be believed, elsewhere it is half a step too far."""
    torch.manual_seed(0)
    symbols = torch.randint(-1, 2, (8, 64)).to(torch.int8)
    apart = torch.randn(8, 64).half()
    error = torch.where(symbols == 0, 0.0, -0.5 * symbols)
    lesson = {"symbols": symbols, "ln_sigma": torch.zeros(8, 64).half(), "apart": apart, "before": apart}
    lesson |= {"error": error.half(), "weight": torch.full((8,), 1 / float(error.square().sum() / 64))}
    lesson |= {"quality": torch.tensor(0.5)}
    estimate = cells.CoefficientEstimate(8, helped=False)
    config = TrainConfig("", "", steps=200, batch=2, learning_rate=1e-2)
    losses = cells.learn(estimate, [lesson], config, progress=False)
    assert losses[0] == 0
    assert np.mean(losses[-10:]) < -0.95  # of the error


def test_a_resumed_run_equals_the_uninterrupted_one(config, tmp_path):
    whole = torch.load(train(config, progress=False), weights_only=True)["ema"]
    parted = replace(config, run_dir=str(tmp_path / "parted"))
    # Three views, each step on what they teach, two sets, each step on what those teach: each ends a run.
    runs = 0
    while not (tmp_path / "parted" / "checkpoint.pt").exists():
        train(replace(parted, minutes=1e-9), progress=False, quiet=True)
        runs += 1
    assert runs > 5 + 2 * config.steps
    resumed = torch.load(train(parted, progress=False), weights_only=True)["ema"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert (tmp_path / "parted" / "log.csv").read_bytes() == (tmp_path / "cells" / "log.csv").read_bytes()


def test_lessons_of_lone_views_outlive_another_run_of_stage_refine(config, tmp_path):
    run = train(config, progress=False).parent
    other = torch.load(config.start_from, weights_only=True)
    other["ema"]["refinement.pair_out.bias"] += 0.5
    torch.save(other, tmp_path / "other.pt")
    kept = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    (run / "checkpoint.pt").unlink()
    train(replace(config, start_from=str(tmp_path / "other.pt")), progress=False)
    same = {file.parent.name: file.stat().st_mtime_ns == then for file, then in kept.items()}
    assert same == {"alone": True, "helped": False}


def test_without_peers_what_they_change_is_left_to_the_plain_curve(config, tmp_path, capsys):
    for n in range(2):
        path = tmp_path / "lone" / str(n) / "view.png"
        path.parent.mkdir(parents=True)
        pil.fromarray(smooth_picture(160, 192, seed=n)).save(path)
    capsys.readouterr()
    after = torch.load(train(replace(config, data=str(tmp_path / "lone"), steps=2), progress=False), weights_only=True)
    assert "no two views of a scene help each other" in capsys.readouterr().err
    assert any(name.startswith("cells.alone.") for name in after["ema"])
    assert not any(name.startswith("cells.helped.") for name in after["ema"])


def test_what_it_cannot_do_is_refused(config, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="knows no distortion ms-ssim"):
        train(replace(config, distortion="ms-ssim"), progress=False)
    state = torch.load(config.start_from, weights_only=True)
    state["train_config"]["distortion"] = "ms-ssim"
    torch.save(state, tmp_path / "ms.pt")
    with pytest.raises(UsageError, match=r"ms\.pt: was trained for ms-ssim, and stage cells lowers squared error"):
        train(replace(config, start_from=str(tmp_path / "ms.pt")), progress=False)
    with pytest.raises(UsageError, match="is nothing that stage cells knows"):
        train(replace(config, crop=64), progress=False)
    own = tmp_path / "cells" / "helped" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(UsageError, match="holds `helped`"):
        train(config, progress=False)
    assert own.read_text() == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process"):
        train(config, progress=False)
