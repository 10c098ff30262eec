"""The widest matrices there are, 28,672 inputs in a 70B model: one moment and its factor, in a process of its own."""

import subprocess
import sys

import pytest

WIDTH = 28672
PROGRAM = f"""
import resource, sys, torch
from casp.moments import SecondMoment, damped_cholesky
draw = torch.Generator().manual_seed(0)
x = torch.randn(96, {WIDTH}, generator=draw)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
moment = SecondMoment({WIDTH})
for part in x.split(48):
    moment.add(part)
value = moment.value()
del moment
lower, damping = damped_cholesky(value, 0.01, "wide")
probe = torch.randn({WIDTH}, generator=draw)
found = (lower @ (lower.T @ probe.to(lower))).double()
known = x.double()
wanted = known.T @ (known @ probe.double()) / len(x) + 0.01 * known.square().mean() * probe.double()
print(damping, (found - wanted).norm().item() / wanted.norm().item())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_a_moment_of_the_widest_and_its_factor():
    """Against the closed form of so few tokens, in at most two matrices of float32 and what a product takes."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    damping, error, more = map(float, done.stdout.split())
    assert damping == 0.01
    assert error < 1e-3
    assert more < 2.3 * 4 * WIDTH**2
