"""Several processes on one run: the same bytes from any number of them.

The engine is `torch.distributed`. `group` opens what torchrun, accelerate or SLURM started and closes it again, `watch`
ends the run where a rank fails, dies or stops, `exchange` is what algorithms see: who owns which items, and how what
they make is put together in the order of the items, whoever made them. A process that nobody started as one of several
is `ALONE`, has no process group and pays nothing.
"""

from casp.ranks.exchange import ALONE, Message, Ranks
from casp.ranks.group import here, opened

__all__ = ["ALONE", "Message", "Ranks", "here", "opened"]
