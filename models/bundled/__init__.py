"""The models that come with dkv: their tasks, and their training."""
