"""The independent check of the log: `jobledger audit` and the fault tests.

The rules follow from docs/wire.md and docs/promises.md alone. Every record is decoded by fastavro alone, and the rules
compare a job's records with each other. Nothing here uses the fold (`jobledger.job`), the codec, or the code with which
the worker and the stream processor decide: a bug there must not hide itself here. import-linter enforces that.

Modules: `records` decodes, `source` reads a namespace, `spill` groups the records by job in bounded memory, `rules`
checks a job's records, `order` checks the order of jobs with the same key, `findings` names the possible faults and
notes, `table` computes the expected status table, `run` combines these.
"""
