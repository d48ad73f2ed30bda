"""The status table: the materializer that writes it from the log, and the functions that rebuild and verify it.

The rules by which facts become a row are in `jobledger.job`. The code for each database is in `store`.
"""
