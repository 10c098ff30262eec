"""Texts and chats with pictures: where they come from, how they are read, and the batches that models take.

One reader serves calibration and evaluation: `chats` reads a .jsonl of texts and chats, `hub` the text sets of the
hub, `sources` gives every set its name, `mixture` mixes sets by shares, `batches` makes what a model is run on.
"""

from casp.data.batches import calibration_batches, fingerprint

__all__ = ["calibration_batches", "fingerprint"]
