"""What an app declares (tasks and their options, queues, retries, events, hooks, resources, projections), and the
running job as its code sees it.

This package checks declarations when they are made, and encodes arguments, results and events. It opens no connection,
and starts no thread except to open and close the app's resources.
"""
