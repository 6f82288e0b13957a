"""Text to token shards to batches. Knows numpy and torch; ranks are only numbers here."""
