"""Run a function in several processes of one gloo group, as the learner's ranks."""

import multiprocessing
import socket
import traceback

import torch


def _rank(rank, world, port, script, arguments, queue):
    try:
        from learner.backend import join_process_group

        torch.set_num_threads(1)
        join_process_group(
            rank=rank, world=world, host="127.0.0.1", port=port, device=torch.device("cpu"), timeout_s=60
        )
        queue.put((rank, script(**arguments)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))


def on_ranks(world, script, **arguments):
    """Run ``script`` in ``world`` processes of one gloo group; returns rank 0's result."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, world, port, script, arguments, queue)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=180) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    for rank, result in results.items():
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return results[0]
