"""What the library costs, measured against what can be had at most: ``python -m benchmarks``."""
