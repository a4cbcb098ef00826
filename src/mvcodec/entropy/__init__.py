"""Entropy coding: integer tables (`tables`) and the range coder between integers and bytes (`coder`)."""

from mvcodec.entropy.coder import Again, Decoder, Encoder, decode, encode, verify
from mvcodec.entropy.tables import SIGMAS, Tables, counts_from_pmf, gaussian_tables

__all__ = [
    "SIGMAS",
    "Again",
    "Decoder",
    "Encoder",
    "Tables",
    "counts_from_pmf",
    "decode",
    "encode",
    "gaussian_tables",
    "verify",
]
