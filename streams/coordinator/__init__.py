"""One coordinator: it reads `<ns>.coordination`, decides, keeps a row for each job that waits, and writes what is due.

`rules` has the decisions and `faust` the library; the modules here connect both. Runs no code of a task.
"""
