"""The log judged by itself: `jobledger audit` and the fault tests.

Rules that anybody could write from docs/wire.md and docs/promises.md. Every record is decoded by fastavro alone, and a
job's records are put beside each other and looked at. Nothing here uses the fold (`jobledger.job`), the codec or what
the worker and the stream processor decide with: a fault there must not hide itself here. import-linter holds that.

Modules: `records` decodes, `source` reads a namespace, `spill` sorts what was read by job in bounded memory, `rules`
judges a job's records, `order` the order of jobs that share a key, `findings` names what they can find, `table` says what the status table should hold, `run` puts these together.
"""
