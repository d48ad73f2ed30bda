"""The records that a worker writes, and what their acknowledgement means.

This package owns the worker's producer and the thread that handles delivery reports. It applies the rules of
`jobledger.consumers.state.outcome` to what a job's code returned or raised, and builds and sends the records.
"""
