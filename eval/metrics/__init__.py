"""One file a metric, and the registry that finds them."""
