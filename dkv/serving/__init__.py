"""Requests that come and go: continuous batches, a server, whole data sets."""
