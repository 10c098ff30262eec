"""Evaluation: what a checkpoint still knows after compression, and how many bytes it takes.

perplexity: text perplexity on non-overlapping windows.
questions:  perplexity and exact match of answers to questions about images.
compare:    both, for several checkpoints, as report.md, report.json and plots.
chat:       questions in the shell.
"""

import casp  # noqa: F401 - first: what a Ctrl-C does while the other libraries load
