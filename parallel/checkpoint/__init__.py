"""Checkpoints that load on any other layout: saved in parts, without gathering, whole or not there at all.

``save`` writes what each rank holds into ``folder/step-00000400/``, in the format of torch.distributed.checkpoint, and
``load`` reads it on any mesh, with or without ZeRO, or on one process. A manifest holds the checksums of all files.
"""

from parallel.checkpoint.loading import Loaded, last_good, load
from parallel.checkpoint.manifest import read_about, verify
from parallel.checkpoint.saving import save
from parallel.checkpoint.whole import (
    checkpoint_to_safetensors,
    export_safetensors,
    full_state_dict,
    import_safetensors,
    load_full_state_dict,
)
from parallel.checkpoint.writing import Saving

__all__ = [
    "Loaded",
    "Saving",
    "checkpoint_to_safetensors",
    "export_safetensors",
    "full_state_dict",
    "import_safetensors",
    "last_good",
    "load",
    "load_full_state_dict",
    "read_about",
    "save",
    "verify",
]
