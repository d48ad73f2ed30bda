"""A coordinator reads `<ns>.coordination`, decides on events, keeps a row for each waiting job, and writes what is due.

The package `rules` contains the decisions. The package `faust` contains all code that depends on Faust. The modules of
this package connect these two packages. The coordinator runs no code of a task.
"""
