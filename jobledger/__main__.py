"""``python -m jobledger``: the command line, also where the script ``jobledger`` is not on the path."""

from jobledger.cli.main import run

if __name__ == "__main__":
    run()
