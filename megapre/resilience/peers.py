"""Heartbeats between the supervisors of a job's hosts, beside the collectives and the ranks.

A cut link makes every collective wait for its timeout; the supervisors notice it in seconds. Every supervisor sends
node 0 a datagram a few times per heartbeat, and node 0 answers with the nodes that it has not heard. Datagrams carry an
HMAC-SHA256 under a secret of the launch and a rising number: strangers, old datagrams and reflected ones are dropped.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megapre.config.check import ConfigError

SIZE = 2048
"""Bytes of a datagram that are read; no valid one is longer."""
TOLD = 256
"""Silent nodes that an answer lists at most."""
BEAT, ANSWER, BYE = 1, 2, 3
_HEAD = struct.Struct("<4sBIQ")
_MAGIC = b"mpre"


class Peers(threading.Thread):
    """One host's end: ``lost`` tells the supervisor which nodes are silent for longer than ``heartbeat`` seconds."""

    def __init__(
        self, node: int, nodes: int, address: str, port: int, secret: bytes, heartbeat: float, bind: str = ""
    ) -> None:
        """Node 0 listens on ``address`` alone, at the UDP port ``port``. OSError when that is no address of its host.

        ``bind`` is the address from which another node sends; empty lets the system choose.
        """
        super().__init__(name="peer-beats", daemon=True)
        self._node, self._nodes, self._heartbeat = node, nodes, heartbeat
        self._key = hashlib.sha256(b"megapre heartbeats" + secret).digest()
        family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        if node == 0:
            self._socket.bind(place)
        else:
            if bind:
                self._socket.bind((bind, 0))
            self._socket.connect(place)
        self._socket.setblocking(False)
        self._number = 0
        self._heard: dict[int, tuple[float, int]] = {}
        """By node: when, and its number then."""
        self._told: dict[int, float] = {}
        """By node: since when node 0 has not heard it, as node 0 says."""
        self._silenced: dict[int, int] = {}
        """By node that was silent: its last number, so that an old datagram does not revive it."""
        self._gone: set[int] = set()
        self._refused = 0
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self.port = self._socket.getsockname()[1]

    def run(self) -> None:
        """Thread body."""
        while not self._finished.wait(min(1.0, self._heartbeat / 5)):
            if self._node:
                self._send(BEAT)
            self._receive()

    def lost(self) -> dict[int, float]:
        """Nodes that are silent for too long, with the seconds. A node counts from the first time it was heard."""
        now = time.monotonic()
        with self._lock:
            waits = {node: now - when for node, (when, _) in self._heard.items() if node not in self._gone}
            found = {node: wait for node, wait in waits.items() if wait > self._heartbeat}
            if self._node and 0 not in found:
                found |= {node: self._heartbeat + now - since for node, since in self._told.items()}
            return found

    def forget(self) -> None:
        """An attempt has ended: whoever is silent counts again from when it is heard again."""
        lost = self.lost()
        with self._lock:
            for node in lost:
                self._silenced[node] = self._heard.pop(node, (0.0, 0))[1]
            self._told.clear()

    @property
    def refused(self) -> int:
        """Datagrams that were dropped because they were not the job's."""
        return self._refused

    def finish(self) -> None:
        """Say goodbye, so that nobody calls this node silent, and stop."""
        self._finished.set()
        if self.ident is not None:
            self.join()
        for _ in range(3):
            if self._node:
                self._send(BYE)
        self._socket.close()

    def _send(self, kind: int, to: Any = None, body: bytes = b"") -> None:
        self._number += 1
        text = _HEAD.pack(_MAGIC, kind, self._node, self._number) + body
        text += hmac.digest(self._key, text, "sha256")
        try:
            self._socket.send(text) if to is None else self._socket.sendto(text, to)
        except OSError:
            pass  # no route, or nobody there: that is what silence tells

    def _receive(self) -> None:
        while True:
            try:
                text, sender = self._socket.recvfrom(SIZE)
            except OSError:
                return  # nothing waits, or the peer's port is closed for now
            read = self._open(text)
            if read is None:
                self._refused += 1
                continue
            kind, body = read
            if kind == BEAT:
                self._send(ANSWER, sender, self._silent())
            elif kind == ANSWER:
                self._take(body)

    def _open(self, text: bytes) -> tuple[int, bytes] | None:
        """Kind and body of a datagram; None for one that is not the job's or not new."""
        if len(text) < _HEAD.size + 32:
            return None
        if not hmac.compare_digest(hmac.digest(self._key, text[:-32], "sha256"), text[-32:]):
            return None
        magic, kind, node, number = _HEAD.unpack_from(text)
        expected = (ANSWER,) if self._node else (BEAT, BYE)
        if magic != _MAGIC or kind not in expected or node >= self._nodes or node == self._node:
            return None
        with self._lock:
            if number <= max(self._heard.get(node, (0.0, 0))[1], self._silenced.get(node, 0)):
                return None
            self._heard[node] = (time.monotonic(), number)
            if kind == BYE:
                self._gone.add(node)
        return kind, text[_HEAD.size : -32]

    def _silent(self) -> bytes:
        nodes = list(self.lost())[:TOLD]
        return struct.pack(f"<{len(nodes)}I", *nodes)

    def _take(self, body: bytes) -> None:
        nodes = {node for (node,) in struct.iter_unpack("<I", body[: len(body) // 4 * 4])} - {self._node}
        now = time.monotonic()
        with self._lock:
            self._told = {node: self._told.get(node, now) for node in nodes}


def launch_name(env: Mapping[str, str]) -> str:
    """What tells this launch from others of the same run folder, the same on all its hosts."""
    return ".".join(env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))


def shared_secret(folder: Path, node: int, launch: str, patience: float = 60.0) -> bytes:
    """32 bytes that node 0 draws and leaves in ``folder``, readable by its user alone, for the other nodes.

    ConfigError where another node does not see them within ``patience`` seconds: the folder is not shared.
    """
    path = folder / "secret"
    if node == 0:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = secrets.token_bytes(32)
        fresh = folder / f".secret-{secrets.token_hex(8)}"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{launch} {drawn.hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
        return drawn
    deadline = time.monotonic() + patience
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor) as file:
                named, _, text = file.read(512).strip().rpartition(" ")
            if named == launch and len(text) == 64:
                return bytes.fromhex(text)
        except (OSError, ValueError):
            pass  # not there yet
        if time.monotonic() > deadline:
            raise ConfigError(
                f"node {node} has not seen what node 0 wrote to {path} for {patience:.0f} s: train.run_dir must be on "
                f"a file system that all hosts share"
            )
        time.sleep(0.2)
