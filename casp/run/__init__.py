"""A stage's work on disk, from the first file to the finished checkpoint with its report and card."""
