"""Throughput, latency and memory of models: `nat-bench`, or `python -m nat_models.benchmark`."""
