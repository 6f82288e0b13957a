"""How the network is spread over processes: launch, groups and DeepSpeed. Knows nothing of the run around it."""
