"""Writing a planned checkpoint: each rank for itself, and given its name when all are done.

A rank's writing needs no other rank, so a thread can do it. That a rank has written is a file, ``rank-00003.done``,
which rank 0 looks for; so a save that nobody waits for is finished all the same.
"""

from __future__ import annotations

import pickle
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

import commlayer
from commlayer import Group
from parallel.checkpoint import files, history
from parallel.checkpoint.manifest import Manifest, write_manifest
from parallel.checkpoint.planner import Writer

# Seconds that rank 0 looks for the files of ranks that say they have written them, or may be gone.
PATIENCE = 60.0

# What a group has not waited for, in the background.
PENDING: dict[Group, Saving] = {}


class Saving:
    """A checkpoint that is being written, by a thread where it is in the background."""

    def __init__(self, group: Group, folder: Path, step: int, aside: Path, keep: int | None, about: Any) -> None:
        self.group, self.folder, self.step = group, folder, step
        self._aside, self._keep, self._about = aside, keep, about
        self._metadata: Metadata | None = None  # on rank 0
        self._thread: threading.Thread | None = None
        self._caller = threading.current_thread()
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._deadline: float | None = None  # for the files of ranks that have written them
        self._problem: str | None = None  # of this rank's writing
        self._failure: str | None = None  # of giving it its name
        self._outcome: Path | OSError | None = None

    def wait(self) -> Path:
        """The checkpoint, when it is whole and has its name. Collective.

        Raises OSError on all ranks where one could not write; nothing is left of the checkpoint then.
        """
        if self._outcome is None:
            self._outcome = self._settle()
            if PENDING.get(self.group) is self:
                del PENDING[self.group]
        if isinstance(self._outcome, OSError):
            raise self._outcome
        return self._outcome

    def _settle(self) -> Path | OSError:
        self._written.wait()
        problems = commlayer.all_gather_object(self._problem, group=self.group)
        texts = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
        if texts:
            self._abandoned.set()
        self._deadline = time.monotonic() + PATIENCE
        if self._thread is not None:
            self._thread.join()
        elif self.group.rank == 0 and not texts:
            self._publish()
        if not texts and (failure := commlayer.broadcast_object(self._failure, group=self.group)):
            texts = [f"rank 0: {failure}"]
        final = files.final(self.folder, self.step)
        if not texts:
            return final
        if self.group.rank == 0:
            files.discard(self._aside)
        commlayer.barrier(group=self.group)  # the space is free again
        return OSError(f"{final} was not saved: {'; '.join(texts)}")

    def begin(
        self, plan: SavePlan, writer: Writer, metadata: Metadata | None, parts: dict[str, bytes], background: bool
    ) -> None:
        """Write the planned tensors and the files in ``parts``; for :func:`save`."""
        self._metadata = metadata
        if not background:
            self._write(plan, writer, parts)
            return

        def work() -> None:
            self._write(plan, writer, parts)
            if self.group.rank == 0:
                self._publish()

        # Not a daemon: the interpreter does not end before it is done.
        self._thread = threading.Thread(target=work, name=f"save step {self.step}", daemon=False)
        self._thread.start()

    def _write(self, plan: SavePlan, writer: Writer, parts: dict[str, bytes]) -> None:
        """This rank's files, and word of it."""
        rank = self.group.rank
        try:
            storage = self._storage()
            storage.prepare_local_plan(plan)
            results = storage.write_data(plan, writer).wait()
            for name, data in parts.items():
                files.write(self._aside / name, data)
            mine = [*self._aside.glob(f"__{rank}_*"), *(self._aside / name for name in parts)]
            sums = {path.name: (path.stat().st_size, files.checksum(path)) for path in mine}
            files.write(self._aside / f"rank-{rank:05}.tmp", pickle.dumps((sums, results)))
            (self._aside / f"rank-{rank:05}.tmp").rename(self._aside / f"rank-{rank:05}.done")
        except Exception as error:
            self._problem = _words(error)
            self._abandoned.set()
        finally:
            self._written.set()

    def _publish(self) -> None:
        """On rank 0: when all have written, the manifest and the name."""
        try:
            if not self._all_written():
                return
            sums, results = {}, []
            for rank in range(self.group.size):
                done = self._aside / f"rank-{rank:05}.done"
                theirs, items = pickle.loads(done.read_bytes())  # of this job, a moment ago
                sums.update(theirs)
                results.append(items)
                done.unlink()
            assert self._metadata is not None
            self._storage().finish(self._metadata, results)
            described = self._aside / ".metadata"
            sums[described.name] = (described.stat().st_size, files.checksum(described))
            number = history.next_number(self.folder)
            write_manifest(self._aside, Manifest(self.step, number, self.group.size, self._about, sums))
            final = files.publish(self._aside, self.folder, self.step)
        except Exception as error:
            self._failure = _words(error)
            return
        finally:
            files.release(self._aside)
        try:
            if self._keep is not None:
                history.remove_old(self.folder, final, self._keep)
        except OSError as error:
            warnings.warn(f"an older checkpoint could not be removed: {error}", stacklevel=1)

    def _all_written(self) -> bool:
        """Whether they have; an error where a rank says so, but its file does not come."""
        lacking = set(range(self.group.size))
        while not self._abandoned.is_set():
            lacking = {rank for rank in lacking if not (self._aside / f"rank-{rank:05}.done").exists()}
            if not lacking:
                return True
            if self._deadline is None and not self._caller.is_alive():  # nobody will wait
                self._deadline = time.monotonic() + PATIENCE
            if self._deadline is not None and time.monotonic() > self._deadline:
                raise OSError(
                    f"nothing of rank {min(lacking)} came to {self._aside}, in a folder that all have to share"
                )
            time.sleep(0.01)
        return False

    def _storage(self) -> FileSystemWriter:
        storage = FileSystemWriter(self._aside)
        storage.set_up_storage_writer(self.group.rank == 0)
        return storage


def _words(error: BaseException) -> str:
    """Of a full disk torch says "unexpected pos", after the system has said what it was."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    first = found or error
    return f"{type(first).__name__}: {first}"
