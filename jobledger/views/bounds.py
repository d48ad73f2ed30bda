"""How much of the status table a page, or an answer of the API, looks at."""

from __future__ import annotations

#: Number of rows that are compared with the filters for one page of jobs, and for one count.
ROWS_MOST, COUNT_ROWS_MOST = 2_000, 2_000
#: Largest number to which jobs are counted by filters for which the table has no counters.
COUNT_MOST = 10_000
