"""What a pass computes: the masks of its slots, its packed entries, and windows around slots."""
