"""The Hugging Face folder of a model, both ways."""
