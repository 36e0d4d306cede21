"""The most confident tokens go into the canvas."""
