"""Benchmarks: each figure beside a bare librdkafka loop of the same run. ``python -m bench`` runs them all."""
