"""torch.distributed's process group of the ranks, from which the collectives are made."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lightllmd.engine.ranks.member import Member
from lightllmd.engine.ranks.rendezvous import LOOPBACK
from lightllmd.errors import EngineError, SystemFailure
from lightllmd.kernels import collectives_environment

_MEETING = timedelta(minutes=5)  # all have imported torch by then
# Of a collective on a CPU. A rank that waits for one that hangs is ended by the supervisor long before.
_COLLECTIVE = timedelta(hours=1)


def open_process_group(member: Member, device: torch.device) -> dist.ProcessGroup:
    """Waits for all ranks; each calls it at about the same time, once in its process's life. gloo for tensors in host
    memory, and on GPUs NCCL for the others. Raises SystemFailure where the ranks can't meet."""
    rendezvous, rank = member.rendezvous, member.rank
    assert rendezvous is not None
    if dist.is_initialized():
        raise EngineError("this process is in a group of ranks already: one with tp > 1 at a time is possible")
    collectives_environment.settle()
    if rendezvous.host == LOOPBACK:
        # Else they look up this host's name, which need not lead to itself.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    try:
        store = dist.TCPStore(
            rendezvous.host,
            rendezvous.port,
            rank.count,
            is_master=member.leads,
            timeout=_MEETING,
            wait_for_workers=False,
            master_listen_fd=member.listener.detach() if member.listener is not None else None,
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank.index,
            world_size=rank.count,
            timeout=_COLLECTIVE,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistError, RuntimeError) as failed:
        where = f"{rendezvous.host}:{rendezvous.port}"
        raise SystemFailure(f"rank {rank.index} can't meet the others at {where}: {failed}") from failed
    group = dist.group.WORLD
    assert group is not None
    return group


def close_process_group() -> None:
    """Of a process that goes on without its group, whose other ranks have ended."""
    if not dist.is_initialized():
        return
    if torch.cuda.is_available():
        dist.distributed_c10d._abort_process_group()  # NCCL's orderly end would wait for the others
    else:
        dist.destroy_process_group()
