"""Entropy coding: integer tables (`tables`) and the range coder between integers and bytes (`coder`)."""

from mvcodec.entropy.coder import decode, decode_ahead, encode
from mvcodec.entropy.tables import SIGMAS, Tables, counts_from_pmf, gaussian_tables

__all__ = ["SIGMAS", "Tables", "counts_from_pmf", "decode", "decode_ahead", "encode", "gaussian_tables"]
