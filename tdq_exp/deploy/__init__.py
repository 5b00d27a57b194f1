"""What runs after a fit: integer execution. Nothing of it is imported unless it is used."""
