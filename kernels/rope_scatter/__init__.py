"""Head norms, rotation and the write into the buffer, as one operation."""
