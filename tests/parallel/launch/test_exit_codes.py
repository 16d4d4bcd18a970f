"""How a process ends with a code."""

import subprocess
import sys

LEAVING = """
import atexit, os
from parallel.launch.exit_codes import leave
atexit.register(os.abort)
print("what was said", end="")
leave(2)
"""


def test_a_rank_that_failed_keeps_its_code_whatever_python_is_taken_down_with() -> None:
    """A thread of gloo that met the end of the interpreter aborted a rank: 134 instead of its 1."""
    left = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (left.returncode, left.stdout, left.stderr) == (2, "what was said", "")
