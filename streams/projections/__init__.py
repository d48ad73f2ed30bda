"""The app's own tables: the runner that reads events and facts, and the databases in which they are folded.

The app declares the fold functions. Offsets are stored in the same transaction as the rows.
"""
