"""The command `jobledger`: one module for each group of commands.

Only this package reads the command line, prints for people, and turns an error into an exit code. The modules import
what they need inside functions, so that `--help` is quick.
"""
