"""The tuner of the fused kernels: `python -m neighborhood_attention.tune --help`."""
