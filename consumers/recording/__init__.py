"""The records that a worker writes, and what their acknowledgement means.

Owns the worker's producer and the thread that handles delivery reports. Builds records from outcomes, and decides no
outcome.
"""
