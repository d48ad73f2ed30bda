"""The demo: imports 28,298 real airports in the background. Run the demo with ``python -m examples.airports``.

``rows`` reads the input, ``app`` contains the task, ``thirdparty`` is the slow and failing service that the task calls,
and ``database`` is the database to which the task writes. ``__main__`` and the other modules run all of this as real
processes and check the report.
"""
