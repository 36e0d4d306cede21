"""dkv as a model of EleutherAI's evaluation harness."""
