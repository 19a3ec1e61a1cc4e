"""The contracts of the public functions, as checks that run on every rank of a group.

``oracle`` computes what NumPy says, ``layouts`` builds tensors of every layout with guarded memory around them,
``cases`` draws cases, ``checks`` runs them. Used on thread ranks (tests/unit) and between processes (tests/spmd).
"""
