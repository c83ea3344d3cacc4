"""`python -m nat_models.benchmark`: the same as nat-bench."""

from nat_models.cli import bench

bench()
