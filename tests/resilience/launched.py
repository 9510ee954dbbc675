"""A small job under the launcher, run as a process by ``test_launcher``: ``launched.py WORLD MODE [CODE]``."""

import ctypes
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from megapre.resilience.launcher import launch

if __name__ == "__mp_main__" and "DIE_EARLY" in os.environ:  # a rank that is being born: the first one dies
    try:
        os.close(os.open(os.environ["DIE_EARLY"], os.O_CREAT | os.O_EXCL))
        os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        pass


def hold_the_interpreter() -> None:
    """Native code that never gives the interpreter back."""
    ctypes.PyDLL(None).sleep(1000)


def rank_main(argv: list[str]) -> int:
    """One rank: join the others, then do what the mode says."""
    from megapre.resilience.pulse import Pulse
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
    if mode == "speak":
        # Native code that writes and dies; Python's buffer is not flushed by it.
        os.write(2, f"last words of rank {ranks.rank}\n".encode() + b"half a line" * (ranks.rank == 0))
        dist.barrier()
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30)
    if mode == "all-raise":
        torch.zeros(1).view(7)
    if mode == "refuse-one" and ranks.rank == 1:
        from megapre.config.check import ConfigError

        raise ConfigError("the job is bad on one rank")
    pulse, turn = Pulse(os.environ), 0
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if mode == "no-progress" or (mode == "progress" and attempt < 4):
        pulse.resumed(attempt if mode == "progress" else 7)
        dist.barrier()
        raise RuntimeError("it happens again")
    if mode == "progress":
        return 0
    while True:
        turn += 1
        pulse.beat("world all_reduce 4")
        if mode == "spin" and ranks.rank == 1 and turn == 40 and attempt == 0:
            hold_the_interpreter()
        # "slow": ten times as long as the others from here on.
        time.sleep(0.2 if mode == "slow" and ranks.rank == 1 and turn > 40 else 0.02)
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
    heartbeat, log = float(os.environ.get("HEARTBEAT", "0")), os.environ.get("LOG")
    watching: dict = {"heartbeat": heartbeat, "log": Path(log) if log else None}
    from megapre.resilience.signals import StopRequest

    asked = StopRequest().install()
    if sys.argv[2] == "early-stop":
        os.kill(os.getpid(), signal.SIGTERM)
    watching["stop"] = asked
    sys.exit(launch(int(sys.argv[1]), rank_main, sys.argv[2:], max_restarts=2, threads=1, **watching))
