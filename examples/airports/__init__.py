"""The demo: 28,298 real airports, imported in the background. Run it with ``python -m examples.airports``.

``rows`` reads the input, ``app`` holds the task, ``thirdparty`` is the slow and failing service that the task asks,
``database`` is what it writes; ``__main__`` and the rest run all of it as real processes and check the account.
"""
