"""The gated activation of the MLP, on the joined product of gate and up."""
