"""Plans for training: the time of a step, and the search for the best layout."""
