"""Leaving a group of processes that have worked together."""

from __future__ import annotations

import gc

import torch


def leave_group() -> None:
    """The last thing that a process does in its group, if it is in one.

    Models that were trained in the group must have been let go of. If torch's reducer of gradients is what holds the
    group last, it waits for the group's thread while it has Python's lock, which that thread may be waiting for.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.collect()  # a model that is part of a cycle goes now, while the group is still held elsewhere
    torch.distributed.destroy_process_group()
