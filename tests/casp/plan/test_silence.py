"""What compiled code prints is kept off the standard output, and nothing else is."""

import subprocess
import sys

PROGRAM = """
import ctypes, os
from casp.plan.silence import silent_stdout
libc = ctypes.CDLL(None)
print("before")
with silent_stdout():
    libc.puts(b"through the C library's buffer")
    os.write(1, b"straight to the descriptor")
print("after")
"""


def test_only_what_compiled_code_prints_meanwhile_is_lost():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "before\nafter\n"
    quiet = "import sys\nfrom casp.plan.silence import silent_stdout\nwith silent_stdout():\n    sys.stderr.write('in')"
    closed = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, quiet], capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "in")
