"""How fast the collectives are: against what users would call instead, and against what the machine allows."""
