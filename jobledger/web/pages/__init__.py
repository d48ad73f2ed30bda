"""The dashboard: pages that are rendered on the server, and the forms that act on jobs, queues and plans.

It owns templates, static files and what the pages show. It writes nothing itself: every action is a call of the `App`.
"""
