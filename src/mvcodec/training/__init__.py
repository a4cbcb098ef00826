"""Training: data, the KLT start, the loop. `mvcodec train` is the command."""
