"""The networks, as descriptions: the only importer of diffusers."""
