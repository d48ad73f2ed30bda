"""The program ``python -m jobledger``: the command line, also if the script ``jobledger`` is not on the ``PATH``."""

from jobledger.cli.main import run

if __name__ == "__main__":
    run()
