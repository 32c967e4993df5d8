"""What matters: how much each channel adds to what a model computes."""
