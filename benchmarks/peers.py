"""Our times beside those of CompressAI's codecs and of our own ablations, on the same pictures in one run.

    make bench                                       # or: python benchmarks/peers.py
    python benchmarks/peers.py --size 128x128 --small

CompressAI's mbt2018-mean and cheng2020-attn have random weights and their own entropy coder: times depend on weights
only through the coder, which is a small part. `fast` is the shipped model. The ablations differ from the untrained
`opam` beside them in the attention of the joint decoder alone, which all three run (gains of one; the refinement is
left out). Ratios are against `fast`, decoded without peers, as CompressAI's pictures are; those of the ablations are
against `opam`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvcodec.runtime import prepare

prepare()  # before torch is imported

import torch

from mvcodec import codec, images
from mvcodec.evaluation import speed
from mvcodec.files import shipped
from mvcodec.images import Image
from mvcodec.weights import DEFAULT_MODEL, Model, load_model

QUALITY = 50.0
ABLATIONS = ("opam", "average", "attention2d")


class Timing(NamedTuple):
    """How to measure."""

    runs: int
    device: torch.device
    clock: Callable[[], float]


def timed(encode: Callable[[], Any], decode: Callable[[Any], object], how: Timing) -> dict[str, Any]:
    """Median milliseconds of both, the decoder given what the encoder made."""
    coded = encode()
    encoding = speed.seconds_of(encode, how.runs, 0, how.device, how.clock)
    decoding = speed.seconds_of(lambda: decode(coded), how.runs, 1, how.device, how.clock)
    return {f"{name}_ms": 1000 * statistics.median(s) for name, s in (("encode", encoding), ("decode", decoding))}


def ours(model: Model, views: Sequence[Image], how: Timing, joint: bool, refine: bool) -> dict[str, Any]:
    def encode() -> list[bytes]:
        return [codec.encode_image(model, view, QUALITY, camera_id=str(k)) for k, view in enumerate(views)]

    return timed(encode, lambda f: codec.decode_set(model, f, joint=joint, refine=refine), how)


def compressai(name: str, views: Sequence[Image], how: Timing, small: bool) -> dict[str, Any]:
    from compressai.models import Cheng2020Attention, MeanScaleHyperprior

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "mbt2018-mean":
            net = MeanScaleHyperprior(*((16, 24) if small else (192, 320)))  # the widths of its higher qualities
        else:
            net = Cheng2020Attention(16 if small else 192)
    net.eval().update(force=True)
    net.to(how.device)
    batches = [codec.to_unit(codec.samples(view).to(how.device)).contiguous() for view in views]

    def encode() -> list[dict[str, Any]]:
        return [net.compress(x) for x in batches]

    def decode(coded: list[dict[str, Any]]) -> list[Any]:
        return [net.decompress(c["strings"], c["shape"]) for c in coded]

    with torch.inference_mode():
        return timed(encode, decode, how)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    width, height = map(int, options.size.split("x"))
    paths = sorted(shipped("examples/nineveh").glob("*.webp"))
    views = [speed.of_size(images.read(path), width, height) for path in paths][: options.views]
    how = Timing(options.runs, device, speed.PROCESSOR if options.cpu_time else speed.WALL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = speed.untrained("tiny", folder, device) if options.small else load_model(DEFAULT_MODEL, device)
        base = ours(model, views, how, joint=False, refine=True)
        yield {"codec": "mvcodec fast, alone", "against": base, **base}
        yield {"codec": "mvcodec fast, joint", "against": base, **ours(model, views, how, joint=True, refine=True)}
        for peer in ("mbt2018-mean", "cheng2020-attn"):
            yield {
                "codec": f"CompressAI {peer}",
                "against": base,
                **compressai(peer, views, how, options.small),
            }
        for mode in ABLATIONS:
            model = speed.untrained("tiny" if options.small else "fast", folder, device, joint=mode)
            found = ours(model, views, how, joint=True, refine=False)
            base = found if mode == ABLATIONS[0] else base
            yield {"codec": f"joint decoder: {mode}", "against": base, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="512x416", metavar="WxH")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="time of the processor: the machine is busy")
    parser.add_argument("--small", action="store_true", help="tiny networks: is the program sound?")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    about = {
        "size": options.size,
        "views": options.views,
        "cpu_time": options.cpu_time,
        **speed.machine(torch.device(options.device)),
    }
    print(json.dumps(about))
    print(f"{'milliseconds a view':<28}{'encode':>9}{'decode':>9}{'ratio of encode':>18}{'of decode':>11}")
    records = []
    for record in measure(options):
        against = record.pop("against")
        record |= {f"{task}_ratio": record[f"{task}_ms"] / against[f"{task}_ms"] for task in ("encode", "decode")}
        records.append(record)
        encode, decode = (record[f"{task}_ms"] / options.views for task in ("encode", "decode"))
        ratios = f"{record['encode_ratio']:>18.2f}{record['decode_ratio']:>11.2f}"
        print(f"{record['codec']:<28}{encode:>9.1f}{decode:>9.1f}{ratios}", flush=True)
    if options.out:
        options.out.write_text("\n".join(json.dumps(r) for r in [about, *records]) + "\n")


if __name__ == "__main__":
    main()
