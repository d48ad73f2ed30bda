"""The status table: the materializer that writes it from the log, and rebuilding and verifying it.

The rules by which facts become a row are in `jobledger.job`, and each database is in `store`.
"""
