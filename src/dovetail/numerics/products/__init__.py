"""Matrix products: grouped, quantised, and with a Tensor Core's sums."""
