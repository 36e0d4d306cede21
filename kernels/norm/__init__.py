"""The root-mean-square norm of hidden states, with the residual added in the same launch."""
