"""A cluster inside one machine: ranks in network namespaces, joined by links of limited rate."""
