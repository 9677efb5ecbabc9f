"""One executor that runs any pipeline schedule."""
