"""Settings from files: the shipped ones are valid, mistakes are told in one sentence."""

from dataclasses import fields

import pytest

from mvcodec.errors import UsageError
from mvcodec.files import shipped
from mvcodec.training.config import TrainConfig, read_config

KNOWN = {field.name.replace("_", "-") for field in fields(TrainConfig)} | {"lr"}


def test_shipped_settings_are_read_by_name():
    names = sorted(path.stem for path in shipped("configs").glob("*.toml"))
    assert {"fast-single", "fast-joint", "fast-refine", "paper-single"} <= set(names)
    for name in names:
        values = read_config(name, KNOWN)
        assert name == f"{values['profile']}-{values['stage']}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 3", "unknown setting 'step'; known: batch, "),
        ("steps 3", "is not TOML"),
        (b"\xff\xfe", "is not TOML"),
        (None, "no such file, and none of fast-cells, fast-decoder, "),
    ],
)
def test_mistakes_are_told(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message):
        read_config(str(file), KNOWN)
