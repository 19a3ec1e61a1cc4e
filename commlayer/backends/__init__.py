"""Transports, one module each, imported only when chosen."""
