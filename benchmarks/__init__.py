"""Side-by-side timings: `make bench`, or `python -m benchmarks --help`. What each figure means: docs/performance.md."""
