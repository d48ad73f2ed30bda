"""Benchmarks. Figures are compared with a bare librdkafka loop of the same run. ``python -m bench`` runs them all."""
