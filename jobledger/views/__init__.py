"""Jobs, plans, events, workers and dead letters as JSON and as text; and the parts of a job that only the log has: its
arguments and its facts. The command line, the HTTP API and the pages show them in the same form. This package uses none
of these three, and writes nothing."""
