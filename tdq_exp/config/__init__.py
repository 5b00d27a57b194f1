"""Configuration: composing it, its schema, the names of runs, and files that travel with the package. Free of torch."""
