"""The exact entropy path, written from `docs/exactness.md` and the structure of nn/ alone: numpy, nothing of mvcodec.

Slow and simple. With `spec_reader` it makes a decoder from file to latents; the tests hold the codec against it. It
knows what the profiles `tiny` and `fast` use. Maps are [C, H, W], without a batch; all numbers are int64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Map = NDArray[np.int64]

LIMIT = 32767  # of an activation, in units of 1 / 256
SCORE = 2**31  # scores of attention are in units of 1 / SCORE
CERTAIN = 2**15  # consistencies and probabilities are in units of 1 / CERTAIN
MU64_LIMIT = 1048544  # 64 * 16383.5
LN_PRIOR_FLOOR = -78656  # -1.2001953125 in units of 2^-16


class Step(NamedTuple):
    """What one coding step is coded with, both shaped as its pass."""

    mu64: Map
    index: Map


def read_model(path: Path) -> tuple[dict[str, Map], dict[str, Any]]:
    """The integers of a model file's entropy path, and its configuration."""
    with safe_open(path, framework="numpy") as file:
        names = [name for name in file.keys() if name.startswith(("h_s.", "para_em.", "tables."))]  # noqa: SIM118
        tensors = {name: file.get_tensor(name).astype(np.int64) for name in names}
        return tensors, json.loads(file.metadata()["config"])


def clamp(x: Map, limit: int = LIMIT) -> Map:
    return np.clip(x, -limit, limit)


def divide(x: Any, n: Any) -> Map:
    """floor(x / n + 1/2)."""
    return (2 * x + n) // (2 * n)


def leaky(a: Map) -> Map:
    return np.where(a < 0, divide(a, 8), a)


def split(full: Map) -> tuple[Map, Map]:
    """Section 7.2 of bitstream_spec.md: [.., H, W] -> anchors (row + column odd) and non-anchors, [.., H, W / 2]."""
    odd = np.indices(full.shape[-2:]).sum(axis=0) % 2 == 1
    half = (*full.shape[:-1], full.shape[-1] // 2)
    return full[..., odd].reshape(half), full[..., ~odd].reshape(half)


def merge(anchor: Map, other: Map) -> Map:
    """Inverse of `split`."""
    full = np.empty((*anchor.shape[:-1], 2 * anchor.shape[-1]), dtype=np.int64)
    odd = np.indices(full.shape[-2:]).sum(axis=0) % 2 == 1
    full[..., odd] = anchor.reshape(*anchor.shape[:-2], -1)
    full[..., ~odd] = other.reshape(*other.shape[:-2], -1)
    return full


def root_scale(channels: int) -> int:
    """round(2^15 channels^-1/2)."""
    return (isqrt(2**32 // channels) + 1) // 2


class Features(NamedTuple):
    """What OPAM needs of one slice."""

    value: Map
    row_key: Map
    column_key: Map


def pad(x: Map, reach: int) -> Map:
    return np.pad(x, ((0, 0), (reach, reach), (reach, reach)))


def same_size(x: Map, weight: Map) -> Map:
    """sum w x of a convolution, weight [out, in, k, k], or [C, 1, k, k] if each channel has its own kernel."""
    (_, height, width), size = x.shape, weight.shape[-1]
    padded, total = pad(x, size // 2), np.zeros((len(weight), height, width), dtype=np.int64)
    for dy, dx in np.ndindex(size, size):
        near, w = padded[:, dy : dy + height, dx : dx + width], weight[:, :, dy, dx]
        total += w[:, :, None] * near if w.shape[1] != len(x) else np.tensordot(w, near, 1)
    return total


def doubled(x: Map, weight: Map) -> Map:
    """sum w x of a transposed 5x5 convolution of stride 2, weight [in, out, 5, 5]: the input at (row, column) reaches
    (2 row + dy - 2, 2 column + dx - 2) by tap (dy, dx)."""
    _, height, width = x.shape
    total = np.zeros((weight.shape[1], 2 * height + 3, 2 * width + 3), dtype=np.int64)
    for dy, dx in np.ndindex(5, 5):
        total[:, dy : dy + 2 * height : 2, dx : dx + 2 * width : 2] += np.tensordot(weight[:, :, dy, dx].T, x, 1)
    return total[:, 2:-1, 2:-1]


class ExactReader:
    """The whole path from z_hat to y_hat; `tensors` and `config` as `read_model` gives them."""

    def __init__(self, tensors: Mapping[str, Map], config: Mapping[str, Any]) -> None:
        assert config["channel_context"] == "opam"
        assert config["global_context"] == "pgcm"
        assert config["shared_source"]
        self.tensors, self.config, self.tile = tensors, config, config["attention_tile"]

    # docs/exactness.md: Convolution, Leaky ReLU, Sum

    def sums(self, name: str, x: Map) -> tuple[Map, Map]:
        """Layer `name` before its rounding: s, in units of 2^-f of an activation, and f [C, 1, 1]."""
        weight, bias, f, r, limit = (
            self.tensors[f"{name}.{part}"] for part in ("weight", "bias", "fraction_bits", "input_shift", "input_limit")
        )
        x = clamp(divide(x, 1 << r[:, None, None]), int(limit[0]))
        total = doubled(x, weight) if "deconv" in name else same_size(x, weight)
        return total + bias[:, None, None], f[:, None, None]

    def convolve(self, name: str, x: Map) -> Map:
        s, f = self.sums(name, x)
        return clamp(divide(s, 1 << f))

    def residual_block(self, name: str, x: Map) -> Map:
        skip = self.convolve(f"{name}.skip", x) if f"{name}.skip.weight" in self.tensors else x
        hidden = leaky(self.convolve(f"{name}.conv1", x))
        return clamp(skip + leaky(self.convolve(f"{name}.conv2", hidden)))

    # Softmax, Mean

    def exponentials(self, score: Map, unit: int, axis: int) -> Map:
        """e of every score, scores in units of 1 / unit."""
        distance = (score.max(axis=axis, keepdims=True) - score) * 128 // unit
        return self.tensors["tables.exp"][np.minimum(distance, 1407)]

    def selective_kernel(self, name: str, x: Map) -> Map:
        small, large = self.convolve(f"{name}.conv3", x), self.convolve(f"{name}.conv5", x)
        pooled = divide(clamp(small + large).sum(axis=(1, 2), keepdims=True), x[0].size)
        squeezed = np.maximum(self.convolve(f"{name}.squeeze", pooled), 0)
        logits = self.convolve(f"{name}.select", squeezed).reshape(2, -1, 1, 1)
        e = self.exponentials(logits, 256, axis=0)
        w = divide(256 * divide(CERTAIN * e[0], e.sum(axis=0)), CERTAIN)
        return divide(w * small + (256 - w) * large, 256)

    def attend_rows(self, query: Map, key: Map, value: Map) -> tuple[Map, Map]:
        """One stage of OPAM -> feature [C, H, W], consistency [H, W]."""
        features, consistencies = [], []
        for start in range(0, query.shape[2], self.tile):
            q, k, v = (x[:, :, start : start + self.tile] for x in (query, key, value))
            score = np.einsum("chi,chj->hij", q, k) * root_scale(len(q))
            e, back = self.exponentials(score, SCORE, axis=2), self.exponentials(score, SCORE, axis=1)
            t = divide(2**30, back.sum(axis=1, keepdims=True))
            total = e.sum(axis=2)
            features.append(divide(np.einsum("hij,chj->chi", e, v), total))
            consistencies.append(divide((e * back * t).sum(axis=2), total * 2**15))
        return np.concatenate(features, axis=-1), np.concatenate(consistencies, axis=-1)

    def opam(self, main: Features, side: Features) -> tuple[Map, Map]:
        row, row_consistency = self.attend_rows(main.row_key, side.row_key, side.value)
        key = self.selective_kernel("para_em.source.opam.column_skm", row)
        feature, consistency = self.attend_rows(*(x.transpose(0, 2, 1) for x in (main.column_key, key, row)))
        return feature.transpose(0, 2, 1), row_consistency * consistency.T // CERTAIN

    # Contexts: the structure of nn/, Gain, Checkerboard window, Attention's reach

    def features(self, x: Map) -> Features:
        """What the shared source makes of a decoded slice."""
        for block in range(2):
            x = self.residual_block(f"para_em.source.embed.{block}", x)
        keys = (self.selective_kernel(f"para_em.source.opam.{which}_skm", x) for which in ("row", "column"))
        return Features(x, *keys)

    def channel_context(self, name: str, last: Map, features: list[Features]) -> Map:
        main = features[-1]
        aligned = np.zeros_like(main.value)
        if sides := [self.opam(main, side) for side in features[:-1]]:
            maps, consistencies = (np.stack(parts) for parts in zip(*sides, strict=True))
            e = self.exponentials(consistencies, CERTAIN, axis=0)
            aligned = divide((e[:, None] * maps).sum(axis=0), e.sum(axis=0))
        fused = np.concatenate([aligned, main.value])
        for block in range(2):
            fused = self.residual_block(f"{name}.fusion.fuse.{block}", fused)
        scaled = clamp(divide(self.tensors[f"{name}.fusion.gain"] * fused, 2**16))
        return self.convolve(f"{name}.out", clamp(last + scaled))

    def local_context(self, name: str, anchor: Map, guide: Map) -> Map:
        window = self.config["window"]
        places = [(y, x) for y in range(window) for x in range(window) if (y + x) % 2]

        def neighbours(half: Map) -> Map:
            """[places, C, H, W / 2]: the anchors around each non-anchor, zero outside the picture."""
            full = merge(half, np.zeros_like(half))
            _, height, width = full.shape
            padded = pad(full, window // 2)
            return np.stack([split(padded[:, y : y + height, x : x + width])[1] for y, x in places])

        keys, values = neighbours(self.convolve(f"{name}.key", anchor)), neighbours(anchor)
        score = np.einsum("chw,kchw->khw", self.convolve(f"{name}.query", guide), keys) * root_scale(len(anchor))
        e = self.exponentials(score + self.tensors[f"{name}.position"] * (SCORE // 2**16), SCORE, axis=0)
        p = divide(CERTAIN * e, e.sum(axis=0))
        weighted = clamp(divide(len(places) * p[:, None] * values, CERTAIN))
        joined = leaky(self.convolve(f"{name}.join", weighted.reshape(-1, *weighted.shape[2:])))
        return self.convolve(f"{name}.out", joined)

    def global_context(self, name: str, anchor: Map, guide: Map) -> Map:
        guide_anchor, guide_other = split(guide)
        value = self.convolve(f"{name}.value", anchor)
        query, key = self.convolve(f"{name}.query", guide_other), self.convolve(f"{name}.key", guide_anchor)
        attended = np.empty_like(value)
        for top in range(0, value.shape[1], self.tile):
            for left in range(0, value.shape[2], self.tile // 2):  # half of a tile's columns are of one pass
                where = np.s_[:, top : top + self.tile, left : left + self.tile // 2]
                q, k, v = (x[where].reshape(len(x), -1) for x in (query, key, value))
                e = self.exponentials(q.T @ k * root_scale(len(q)), SCORE, axis=1)
                attended[where] = divide(v @ e.T, e.sum(axis=1)).reshape(attended[where].shape)
        x = self.convolve(f"{name}.conv", merge(value, attended))
        hidden = leaky(self.convolve(f"{name}.depth_rb.expand", x))
        hidden = leaky(self.convolve(f"{name}.depth_rb.depthwise", hidden))
        return split(clamp(x + self.convolve(f"{name}.depth_rb.project", hidden)))[1]

    def lattice(self, name: str, hyper: Map, code: Callable[[str, list[Map]], tuple[Map, Map]]) -> tuple[Map, Map]:
        """Anchors of slice 0 in three passes -> 64 y_hat and y_hat as the networks see it, both packed."""

        def context(which: str, known: Map) -> Map:
            for layer in ("conv1", "conv2"):
                known = leaky(self.convolve(f"{name}.lattice.{which}_context.{layer}", known))
            return known

        even_rows, odd_rows = split(hyper)[0][:, 0::2], split(hyper)[0][:, 1::2]
        here, there = split(even_rows)
        first = code(f"{name}.anchor_parameters", [here])
        around = split(context("between", merge(first[1], np.zeros_like(first[1]))))[1]
        second = code(f"{name}.lattice.between_parameters", [there, around])
        even = [merge(a, b) for a, b in zip(first, second, strict=True)]
        odd = code(f"{name}.lattice.odd_parameters", [odd_rows, context("odd", even[1])])
        rows = (np.stack(pair, axis=2) for pair in zip(even, odd, strict=True))
        anchor64, anchor = (x.reshape(len(x), -1, x.shape[-1]) for x in rows)
        return anchor64, anchor

    # Output

    def step(self, name: str, inputs: list[Map], unit: Map, prior: Map) -> Step:
        """Parameter network `name` -> mu64 and index; unit and prior in units of 2^-16."""
        x = np.concatenate(inputs)
        for layer in range(len(self.config["parameter_widths"])):
            x = leaky(self.convolve(f"{name}.hidden.{layer}", x))
        s, f = self.sums(f"{name}.last", x)
        (s_mu, s_sigma), (f_mu, f_sigma) = np.split(s, 2), np.split(f, 2)
        mu64 = clamp(divide(s_mu * unit, 1 << (18 + f_mu)), MU64_LIMIT)
        ln_sigma = (s_sigma << 8) + (prior << f_sigma)  # in units of 2^-(16 + f)
        thresholds = self.tensors["tables.sigma_thresholds"]
        return Step(mu64, sum((threshold << f_sigma) < ln_sigma for threshold in thresholds) + np.int64(0))

    def read(self, z_hat: Map, quality: int, symbols: Callable[[int, Map], Map]) -> tuple[list[Step], Map]:
        """z_hat [N, h, w], quality as in the header; symbols(step, index) gives what was coded -> steps, 64 y_hat."""
        hyper = clamp(256 * z_hat)
        for layer in ("deconv1", "deconv2"):
            hyper = leaky(self.convolve(f"h_s.{layer}", hyper))
        hyper = self.convolve("h_s.conv3", hyper)
        ln_gain = (-18121 * (10000 - quality) + 169252 * quality) // 10000
        units, spreads = (np.split(self.tensors[f"para_em.{n}"], self.config["slices"]) for n in ("unit", "ln_spread"))
        steps: list[Step] = []
        done: list[Map] = []
        seen: list[Map] = []
        features: list[Features] = []
        for i, unit in enumerate(units):
            name, prior = f"para_em.models.{i}", np.maximum(spreads[i] + ln_gain, LN_PRIOR_FLOOR)

            def code(parameters: str, inputs: list[Map], unit: Map = unit, prior: Map = prior) -> tuple[Map, Map]:
                """One pass: 64 y_hat, and y_hat as the networks see it."""
                steps.append(self.step(parameters, inputs, unit, prior))
                mu64, index = steps[-1]
                y64 = mu64 + 64 * np.where(index == 0, 0, symbols(len(steps) - 1, index))
                return y64, clamp(divide(y64 * 2**18, unit))

            guide, known = hyper, [hyper]
            if i:
                features.append(self.features(seen[-1]))
                guide = self.channel_context(f"{name}.channel_context", seen[-1], features)
                known = [hyper, guide, *(seen if self.config["raw_slices"] else [])]
            anchors, others = zip(*map(split, known), strict=True)
            if i == 0 and self.config.get("anchor_lattice"):
                anchor64, anchor = self.lattice(name, hyper, code)
            else:
                anchor64, anchor = code(f"{name}.anchor_parameters", list(anchors))
            local = self.local_context(f"{name}.local_context", anchor, split(guide)[1])
            far = self.global_context(f"{name}.global_context", anchor, guide)
            other64, other = code(f"{name}.other_parameters", [*others, local, far])
            done.append(merge(anchor64, other64))
            seen.append(merge(anchor, other))
        return steps, np.concatenate(done)
