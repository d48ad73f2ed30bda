"""The worker and the router: they read work topics and events, run the app's code or submit jobs, and write facts.

Imports nothing of `jobledger.streams`: both meet only in the log.
"""
