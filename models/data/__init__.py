"""Data sources: real gridded fields, and how ranks share them."""
