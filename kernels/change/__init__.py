"""How far the hidden states of a pass are from those that were kept, and which of them go on and are kept anew."""
