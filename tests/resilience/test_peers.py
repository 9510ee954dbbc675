"""Heartbeats between hosts: a cut link is noticed and named, strangers are not listened to, slow ranks live."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megapre.config.check import ConfigError
from megapre.resilience.peers import BEAT, Peers, launch_name, shared_secret

SCRIPT = Path(__file__).with_name("launched.py")
SECRET = b"s" * 32
Make = Callable[..., Peers]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Peers] = []

    def begin(node: int, port: int, *, nodes: int = 3, secret: bytes = SECRET, heartbeat: float = 0.5) -> Peers:
        made.append(Peers(node, nodes, "127.0.0.1", port, secret, heartbeat))
        made[-1].start()
        return made[-1]

    yield begin
    for peers in made:
        peers.finish()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def test_a_silent_node_is_known_to_all_and_one_that_says_goodbye_is_not_missed(make: Make) -> None:
    first = make(0, 0)
    second, third = make(1, first.port), make(2, first.port)
    time.sleep(1.5)
    assert first.lost() == second.lost() == third.lost() == {}, "all are heard"
    second._finished.set()  # as of a host that is gone: no goodbye
    wait_for(lambda: set(first.lost()) == {1} and set(third.lost()) == {1})
    assert 0.5 < first.lost()[1] < 5
    first.forget()
    assert first.lost() == {}, "it counts again once it is heard again"
    third.finish()
    time.sleep(1.0)
    assert first.lost() == {}


def test_the_others_miss_node_0(make: Make) -> None:
    first = make(0, 0)
    second = make(1, first.port)
    time.sleep(0.5)
    first._finished.set()
    wait_for(lambda: set(second.lost()) == {0})


def test_strangers_old_and_reflected_datagrams_change_nothing(make: Make) -> None:
    first = make(0, 0)
    second = make(1, first.port)
    wait_for(lambda: first._heard)
    place = ("127.0.0.1", first.port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for text in (b"", b"x", os.urandom(100), os.urandom(2000), b"mpre" + bytes(200), os.urandom(60_000)):
            stranger.sendto(text, place)
        other = Peers(2, 3, *place, b"another secret", 0.5)
        other._send(BEAT)
        sent: list[bytes] = []
        honest = Peers(2, 3, *place, SECRET, 0.5)
        honest._socket.close()
        honest._socket = type("Tap", (), {"send": lambda self, text: sent.append(text), "close": lambda self: None})()
        honest._send(BEAT)
        stranger.sendto(sent[0], place)
        wait_for(lambda: 2 in first._heard)
        before, refused = first._heard[2], first.refused
        for text in (sent[0], sent[0][:-1], bytes([sent[0][0] ^ 1]) + sent[0][1:]):
            stranger.sendto(text, place)
        wait_for(lambda: first.refused >= refused + 3)
        assert first._heard[2] == before, "one of yesterday does not make a node alive"
        other.finish()
    assert first.refused >= 10 and set(first._heard) == {1, 2} and second.is_alive() and first.is_alive()


def test_only_the_given_address_listens(make: Make) -> None:
    first = make(0, 0)
    listening = [line.split()[1] for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    assert f"0100007F:{first.port:04X}" in listening and f"00000000:{first.port:04X}" not in listening
    with pytest.raises(OSError):
        Peers(0, 2, "192.0.2.7", 0, SECRET, 1.0)


def test_the_secret_is_for_this_launch_and_this_user(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "target").write_text("keep")
    (folder / "secret").symlink_to(tmp_path / "target")
    found: list[bytes] = []
    late = threading.Thread(target=lambda: found.append(shared_secret(folder, 1, "7.0.1", 10)))
    late.start()
    time.sleep(0.3)
    old = shared_secret(folder, 0, "7.0.0")
    time.sleep(0.5)
    assert not found, "that of the attempt before is not taken"
    drawn = shared_secret(folder, 0, "7.0.1")
    late.join()
    assert found == [drawn] and drawn != old and len(drawn) == 32
    assert stat.S_IMODE((folder / "secret").lstat().st_mode) == 0o600
    assert (tmp_path / "target").read_text() == "keep" and [p.name for p in folder.iterdir()] == ["secret"]
    with pytest.raises(ConfigError, match="all hosts share"):
        shared_secret(tmp_path / "elsewhere", 1, "7.0.1", 0.1)
    assert launch_name({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}) == "7.0.0"


class Hosts:
    """Two hosts: network namespaces with one link, a supervisor and a rank in each."""

    def __init__(self, folder: Path, mode: str, heartbeat: float) -> None:
        self.tag = f"{os.getpid() % 10**5}{len(list(folder.iterdir()))}"
        self.names = [f"mp{self.tag}{side}" for side in "ab"]
        self.logs = [folder / f"node{n}.txt" for n in (0, 1)]
        for name in self.names:
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
        self.ip("link", "add", self.names[0], "type", "veth", "peer", "name", self.names[1])
        for n, name in enumerate(self.names):
            self.ip("link", "set", name, "netns", name)
            self.ip("-n", name, "addr", "add", f"10.77.0.{n + 1}/24", "dev", name)
            self.ip("-n", name, "link", "set", name, "up")
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import launched;"
            "from megapre.resilience.launcher import launch; from pathlib import Path;"
            f"sys.exit(launch(2, launched.rank_main, [{mode!r}], nnodes=2, node_rank=int(sys.argv[2]), max_restarts=1,"
            f"address='10.77.0.1', port=29500, threads=1, heartbeat={heartbeat}, secret=b's' * 32,"
            "log=Path(sys.argv[3])))"
        )
        self.nodes = []
        for n, (name, log) in enumerate(zip(self.names, self.logs)):
            env = os.environ | {"PYTHONPATH": f"{SCRIPT.parents[2]}:{SCRIPT.parent}", "GLOO_SOCKET_IFNAME": name}
            command = ["ip", "netns", "exec", name, sys.executable, "-c", code, str(SCRIPT.parent), str(n), str(folder)]
            out = log.open("wb")
            self.nodes.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True))

    def ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def text(self) -> str:
        return "\n".join(f"{log}: {log.read_text(errors='replace')}" for log in self.logs)

    def up(self, rank: int) -> list[int]:
        return [int(pid) for pid in re.findall(rf"up rank={rank} pid=(\d+)", self.text())]

    def close(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    made: list[Hosts] = []

    def begin(mode: str, heartbeat: float) -> Hosts:
        made.append(Hosts(tmp_path, mode, heartbeat))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def cut_and_time(pair: Hosts, heartbeat: float) -> float:
    """Cut the link of two hosts that train; the seconds until both have ended their ranks, the other one named."""
    wait_for(lambda: pair.up(0) and pair.up(1), 90)
    time.sleep(2)
    ranks = [pair.up(0)[-1], pair.up(1)[-1]]
    pair.ip("-n", pair.names[1], "link", "set", pair.names[1], "down")
    began = time.monotonic()
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in ranks), heartbeat + 20)
    return time.monotonic() - began


@pytest.mark.nightly
def test_a_cut_link_is_named_on_both_sides_and_heals(hosts: Callable[..., Hosts]) -> None:
    """No reset, no end of file: the collectives' timeout here is 60 s, the heartbeat 5."""
    pair = hosts("loop", 5.0)
    took = cut_and_time(pair, 5.0)
    assert 4 < took < 5 + 5, pair.text()
    assert "node 1 has not been heard" in pair.logs[0].read_text() and "node 0 has not" in pair.logs[1].read_text()
    assert "killed by a signal" not in pair.text(), "one headline"
    pair.ip("-n", pair.names[1], "link", "set", pair.names[1], "up")
    wait_for(lambda: len(pair.up(0)) == 2 and len(pair.up(1)) == 2, 90)
    pair.nodes[1].send_signal(signal.SIGTERM)
    assert [node.wait(60) for node in pair.nodes] == [75, 75], pair.text()


@pytest.mark.nightly
def test_a_slow_rank_of_another_host_lives_and_nothing_listens_elsewhere(hosts: Callable[..., Hosts]) -> None:
    pair = hosts("slow", 2.0)
    wait_for(lambda: pair.up(0) and pair.up(1), 90)
    time.sleep(12)
    command = ["ip", "netns", "exec", pair.names[0], "cat", "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    open_ = [line.split()[1] for line in table.splitlines() if " 0A " in line or "00000000:0000 07" in line]
    assert open_ and not [place for place in open_ if set(place.partition(":")[0]) == {"0"}], open_
    pair.nodes[0].send_signal(signal.SIGTERM)
    assert [node.wait(60) for node in pair.nodes] == [75, 75], pair.text()
    assert "hung" not in pair.text() and "not been heard" not in pair.text() and "restart" not in pair.text()
