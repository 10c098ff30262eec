"""Fine-tuning of what is compressed: in the block and end to end, beside the original model."""
