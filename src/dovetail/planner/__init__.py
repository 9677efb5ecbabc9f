"""Plans training and serving on a cluster, and explains every number."""
