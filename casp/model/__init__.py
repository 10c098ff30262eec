"""A model as a decoder of blocks: opened, fed, changed and put together again."""
