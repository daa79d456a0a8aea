"""Test of an all-to-all and an all-reduce across all ranks; `ldmole doctor` launches it like a training run."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ldmole_dist.cluster.exit import exit_process
from ldmole_dist.cluster.heartbeat import heartbeat, show_stacks
from ldmole_dist.engine.startup import start

MEGABYTES = 16  # size of each rank's input


def main() -> None:
    """Run an all-to-all and an all-reduce on all ranks, check their results, and print their times on rank 0.

    Raises:
        RuntimeError: if this rank received wrong values.
    """
    show_stacks()
    heartbeat("rendezvous with the other ranks")
    process = start(timeout_minutes=2)
    size = process.world_size
    elements = MEGABYTES * 2**20 // 4 // size * size
    sent = torch.full((elements,), float(process.rank), device=process.device)
    received = torch.empty_like(sent)
    results = []
    for name in ("all-to-all", "all-reduce"):
        for _ in range(2):  # time only the second call: the first one sets up the connections
            heartbeat(f"{name} of {MEGABYTES} MB")
            dist.barrier()
            started = time.perf_counter()
            if name == "all-to-all":
                dist.all_to_all_single(received, sent)
            else:
                received.copy_(sent)
                dist.all_reduce(received)
            if process.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        expected = (
            torch.arange(size).repeat_interleave(elements // size) if name == "all-to-all" else size * (size - 1) / 2
        )
        if not torch.equal(received, torch.as_tensor(expected).to(received).expand_as(received)):
            raise RuntimeError(f"{name}: rank {process.rank} received wrong values; check the network and its drivers")
        results.append(
            f"{name} of {MEGABYTES} MB in {seconds * 1e3:.0f} ms ({MEGABYTES / 1024 / seconds:.2f} GB/s per rank)"
        )
    if process.is_main:
        print(f"doctor: {size} ranks: " + ", ".join(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    exit_process(0)
