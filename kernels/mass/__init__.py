"""How much attention every slot of the buffer gets from the active queries."""
