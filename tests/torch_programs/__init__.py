"""Ordinary programs for torch.distributed, which know of the backend under them nothing but its name, from outside.

``python -m tests.torch_programs --backend NAME --out FOLDER`` runs them in one job, under whatever launcher started it.
pytest runs such jobs on torch's own CPU backend and on "commlayer" over many layers, and compares what they computed.
"""
