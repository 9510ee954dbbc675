"""Stop requests, and the variables that must stand before torch is loaded."""

import os
import signal
import subprocess
import sys

import pytest

from megapre.checkpoint.reshard import CheckpointError
from megapre.resilience.environment import ALLOCATOR, DEVICE, prepare, shown, threads_per_rank, uses_glibc
from megapre.resilience.signals import STOP_SIGNALS, StopRequest
from megapre.resilience.worker import is_refusal, sentence


@pytest.fixture(autouse=True)
def keep_handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    stop = StopRequest().install()
    assert not stop.requested() and stop.reason == ""
    os.kill(os.getpid(), number)
    assert stop.requested() and stop.reason == number.name


def test_repeated_terms_are_harmless_and_the_first_is_the_reason() -> None:
    stop = StopRequest().install()
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert stop.reason == "SIGUSR1"


def test_a_second_ctrl_c_interrupts() -> None:
    StopRequest().install()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_sent_while_blocked_arrive_at_install() -> None:
    """In a process of its own: a library's thread in this one could take the signal."""
    code = """
import os, signal, sys
from megapre.resilience.signals import STOP_SIGNALS, StopRequest
stop = StopRequest()
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
os.kill(os.getpid(), signal.SIGUSR1)
before = stop.requested()
sys.exit(0 if not before and stop.install().requested() else 1)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_signals_need_no_torch() -> None:
    code = "import megapre.resilience.signals, megapre.resilience.launcher, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_threads_are_the_jobs_then_the_environments_then_a_share_of_the_cores() -> None:
    assert threads_per_rank(3, 2, {"OMP_NUM_THREADS": "5"}) == 3
    assert threads_per_rank(0, 2, {"OMP_NUM_THREADS": "5"}) == 5
    assert threads_per_rank(0, 10**6, {}) == 1


def test_prepare_keeps_what_the_user_set() -> None:
    mine = {"GLIBC_TUNABLES": "mine", "GLOO_SOCKET_IFNAME": "eth0", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    env = dict(mine)
    prepare(env, 2, single_host=True)
    assert env == {**DEVICE, **mine, "OMP_NUM_THREADS": "2"}
    assert shown(env | {"SECRET_TOKEN": "x"}) == (
        "CUDA_DEVICE_MAX_CONNECTIONS=8 GLIBC_TUNABLES=mine GLOO_SOCKET_IFNAME=eth0 NCCL_DEBUG=WARN OMP_NUM_THREADS=2 "
        "PYTORCH_ALLOC_CONF=expandable_segments:True"
    )
    env = {}
    prepare(env, 2, single_host=False)
    assert "GLOO_SOCKET_IFNAME" not in env
    across = {"NCCL_SOCKET_IFNAME": "ib0"}
    prepare(across, 2, single_host=False)
    assert across["GLOO_SOCKET_IFNAME"] == "ib0"
    assert env.get("GLIBC_TUNABLES") == (ALLOCATOR if uses_glibc() else None)


def test_only_our_own_value_errors_are_refusals() -> None:
    from megapre.config.check import ConfigError, check
    from megapre.config.load import from_dict
    from megapre.resilience.launcher import launch

    def caught(action) -> Exception:
        try:
            action()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert is_refusal(ConfigError("a"))
    assert is_refusal(caught(lambda: check(from_dict({"model": {"heads": 3}}))))
    assert is_refusal(caught(lambda: launch(3, lambda argv: 0, [], nnodes=2)))
    assert not is_refusal(caught(lambda: int("x"))) and not sentence(caught(lambda: int("x")))
    assert sentence(ConfigError("a")) == sentence(CheckpointError("a")) == "megapre: a"
    assert not is_refusal(CheckpointError("a")), "a disk may have room again: the exit code is that of a failure"
    assert not is_refusal(caught(lambda: {}["x"]))
