"""The command `jobledger`: one module for each group of commands.

This is the only place that reads the command line, prints for people, and turns an error into an exit code. Modules import
what they need inside of functions, so that `--help` is quick.
"""
