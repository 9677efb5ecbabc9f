"""Training: one step, a whole run, its reports, and comparisons of recipes."""
