"""Files of tensors, complete checkpoints, and the saving of them beside the run."""
