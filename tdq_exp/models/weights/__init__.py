"""Reading and writing weights, from any of the formats that people have."""
