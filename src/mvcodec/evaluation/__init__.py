"""Measuring the codec against others: `metrics`, `bdrate`, `peers`, and the `report` that puts them together."""
