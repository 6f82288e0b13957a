"""What a run shows: its page, its drawings, the comparison of two."""
