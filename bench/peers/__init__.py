"""This project beside other job systems, in turn on one machine: ``python -m bench.peers``, `make bench-peers`."""
