"""The network: one mixer a file, single-device code."""
