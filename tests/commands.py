"""`persona-steer` as the tests start it: forked from a process that has torch at hand (tests/warm), or from nothing"""
import os, sys
from pathlib import Path

from warm import SOCKET  # conftest.py says where that is

COLD = Path(sys.executable).parent / "persona-steer"
COMMAND = Path(__file__).parent / "warm/bin/persona-steer" if SOCKET in os.environ else COLD
