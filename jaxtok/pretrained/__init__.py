"""Foreign checkpoints -> our parameter trees: one table a model, one converter for all."""
