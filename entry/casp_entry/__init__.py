"""What an installed CASP adds to Python itself: a hook at start-up and the command `casp`.

Nothing here imports PyTorch, transformers or `casp` before it is needed: the hook runs in every Python process of the
environment.
"""
