"""A small job under the launcher, run as a process by ``test_launcher``: ``launched.py WORLD MODE [CODE]``."""

import os
import sys
import time
from datetime import timedelta

from megapre.resilience.launcher import launch


def rank_main(argv: list[str]) -> int:
    """One rank: join the others, then do what the mode says."""
    from megapre.resilience.ranks import Ranks, discover
    from megapre.resilience.rendezvous import open_store
    from megapre.resilience.signals import StopRequest

    stop = StopRequest().install()
    ranks = discover(os.environ, 0)
    assert isinstance(ranks, Ranks)
    import torch
    import torch.distributed as dist

    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", store=open_store(ranks, 60), rank=ranks.rank, world_size=ranks.world, timeout=wait)
    count = torch.ones(1)
    dist.all_reduce(count)
    assert count.item() == ranks.world
    print(f"up rank={ranks.rank} pid={os.getpid()} threads={torch.get_num_threads()}", flush=True)
    mode = argv[0]
    if mode == "return":
        return int(argv[1])
    if mode == "all-raise":
        torch.zeros(1).view(7)
    if mode == "refuse-one" and ranks.rank == 1:
        from megapre.config.check import ConfigError

        raise ConfigError("the job is bad on one rank")
    while True:
        time.sleep(0.02)
        flag = torch.tensor([float(stop.requested())])
        # "deaf": rank 0 is busy elsewhere and neither notices a dead peer nor a stop.
        if mode == "deaf" and ranks.rank == 0:
            time.sleep(60)
        dist.all_reduce(flag)
        if flag.item():
            if ranks.rank == 0:
                print(f"saved after {stop.reason}", flush=True)
            return 75


if __name__ == "__main__":
    sys.exit(launch(int(sys.argv[1]), rank_main, sys.argv[2:], max_restarts=2, threads=1))
