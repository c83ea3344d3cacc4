"""Two processes of one group, on the CPU."""

import os
import socket
from multiprocessing import get_context

from torch import distributed


def free_port():
    """Of this host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_two(work, *arguments):
    """What `work(rank, *arguments)` returns in each, by rank."""
    context, port = get_context("fork"), free_port()
    results = context.Queue()
    processes = [
        context.Process(target=_process, args=(work, arguments, rank, port, results), daemon=True)
        for rank in (0, 1)
    ]
    for one in processes:
        one.start()
    both = dict(results.get(timeout=60) for _ in processes)
    for one in processes:
        one.join(timeout=10)
    return both


def _process(work, arguments, rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    results.put((rank, work(rank, *arguments)))
    distributed.destroy_process_group()
