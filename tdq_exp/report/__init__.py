"""Reports: rows become tables and charts."""
