"""The app's own tables: the runner that reads events and facts, and the databases in which they are folded.

The fold functions are the app's; offsets are stored in the same transaction as their rows.
"""
