"""The independent check of the log, for `jobledger audit` and the fault tests.

The rules follow only from docs/wire.md and docs/promises.md, and compare the records of a job with each other. fastavro
alone decodes the records. This package must not use the fold (`jobledger.job`), the codec, or the code with which the
worker and the stream processor decide: otherwise a bug in that code could hide itself from the audit. import-linter
checks this.

Modules: `records` decodes, `source` reads a namespace, `spill` groups the records by job in bounded memory, `rules`
checks a job's records, `order` checks the order of jobs with the same key, `findings` names the possible faults and
notes, `table` computes the expected status table, `run` combines these.
"""
