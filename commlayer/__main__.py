"""``python -m commlayer`` is the ``commlayer`` command, also where scripts are not on the PATH."""

from commlayer.cli import app

if __name__ == "__main__":
    app(prog_name="commlayer")
