"""Runs one worker process: creates its parts, starts and ends them in order, and reports health and metrics.

No other package of the worker imports this package.
"""
