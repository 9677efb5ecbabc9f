"""Multi-head latent attention, from the projections to the attention core."""
