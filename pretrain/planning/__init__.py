"""What a run amounts to before it runs: sizes, layout, memory, time."""
