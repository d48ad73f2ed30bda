"""Jobs, plans and events as JSON, and what only the log has of a job: its arguments and its facts. The command line and
the HTTP API show them in the same form. This package knows neither of the two, and writes nothing."""
