"`python -m spml_kit`: the command `spml_run`"
import sys

from .runs.cli import spml_run

sys.exit(spml_run())
