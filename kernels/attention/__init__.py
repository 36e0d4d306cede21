"""Attention of the active queries over the buffer."""
