"""Models, schedules, GPUs, clusters, fabrics and precision recipes by name; TOML files beside them."""
