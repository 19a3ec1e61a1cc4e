"""Faults: ranks that die, stall or call something else, on real jobs; what the other ranks then see, and how soon.

``python -m tests.faults`` runs all of it and writes docs/reliability.md; pytest runs a short form.
"""
