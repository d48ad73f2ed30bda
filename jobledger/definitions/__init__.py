"""What an app declares: tasks and their options, queues, retries, events, hooks, resources and projections; and the job that
runs, as its code sees it.

Checks declarations when they are made, and encodes arguments, results and events. Opens no connection, and starts no
thread.
"""
