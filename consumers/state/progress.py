"""Defines how often the progress of a job is sent, by a worker and by a child process. A child process imports this
module, so the module imports nothing that is slow to import.
"""

from __future__ import annotations

#: Seconds between two progress facts of one job, and between two progress messages of a child process.
PROGRESS_INTERVAL_S = 0.1
