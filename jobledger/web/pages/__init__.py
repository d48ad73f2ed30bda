"""The dashboard: pages that are rendered on the server, and the forms that act on jobs, queues and plans.

This package owns templates, static files and the contents of the pages. The package writes nothing itself: every action
is a call of the app or of its client.
"""
