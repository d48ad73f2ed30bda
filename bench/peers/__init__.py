"""Measures this project and other job systems, one after another on one machine: ``python -m bench.peers``, `make
bench-peers`."""
