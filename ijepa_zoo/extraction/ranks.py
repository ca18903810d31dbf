"""The processes of one ``torchrun`` start that share a run; a single process is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ..processes import disconnect

_PATIENCE = timedelta(days=7)  # ranks wait for the slowest; a dead one closes its connection


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the run.

    Attributes:
        rank: Number of this process.
        world: How many there are.
        group: gloo process group, None for a single process.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the other processes that ``torchrun`` started, by its environment variables.

    A rank that leaves with an exception closes its connections, which ends the waiting of the
    others with an error: no run goes on with a part of its ranks.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if started:
            disconnect()
