"""Trellis codebooks: a closed walk through 2^L states down the rows of each column (arXiv 2406.11235).

`T` weights of one column, a strip, are stored as `T k` bits, a cyclic stream whose first bit is the lowest of the first
byte. The state at weight t is the window of L bits that begins at bit `k t`, the first bit lowest, and the weight is
what the table says of that state: `k` new bits enter a state at the top, `s_{t+1} = s_t >> k | c << (L - k)`. Since
the stream is closed, nothing but these bits is stored and any weight is decoded from the bits around its place.
"""
