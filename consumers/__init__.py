"""The worker and the router: they read work topics and events, run the app's code or submit jobs, and write facts.

`jobledger.consumers` imports nothing of `jobledger.streams`; they exchange data only through topics.
"""
