"""Products with weights of 8 or 4 bits, which are undone on the way: activations stay as they are."""
