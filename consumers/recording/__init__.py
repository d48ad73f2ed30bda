"""The records that a worker writes, and what their acknowledgement means.

This package owns the worker's producer and the thread that handles delivery reports. It builds records from outcomes,
and decides no outcome.
"""
