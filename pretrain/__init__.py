"""The run: configuration, assembly, loop, checkpoints, metrics and the command line. Alone sees all other packages."""
