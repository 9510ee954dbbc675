"""Training data in S3: a real server of its protocol on this machine, s3fs and fsspec."""

from __future__ import annotations

import subprocess

import pytest

from tests.extras import environment, extra_python

pytestmark = pytest.mark.nightly
JOB = """
import os, sys, tempfile
from itertools import islice
from pathlib import Path

from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
os.environ["AWS_ENDPOINT_URL"] = "http://%s:%d" % server.get_host_and_port()
import fsspec
import torch
from megapre.data import remote
from megapre.data.check import check_data
from megapre.data.indexed import IndexedDataset
from megapre.data.loader import Loader
from tests.data.corpora import VOCAB, job, write_pair

folder, remote.BLOCK_BYTES = Path(sys.argv[1]), 1 << 16
remote.Cache.__init__.__defaults__ = (1 << 16,)
store = fsspec.filesystem("s3")
store.mkdir("bucket")


def put(name, seed):
    prefix = write_pair(folder / f"{name}{seed}", [37] * 20_000, seed=seed)
    for suffix in (".bin", ".idx", ".json"):
        store.put_file(prefix + suffix, f"bucket/set/{name}{suffix}")
    return prefix


prefix = put("a", 1)
(folder / "set.manifest.json").write_text('{"pairs": ["a"]}')
store.put_file(str(folder / "set.manifest.json"), "bucket/set/set.manifest.json")
for url in ("s3://bucket/set/a", "s3://bucket/set/set.manifest.json"):
    config = job([url], cache_dir=str(folder / "cache"), reset_attention=True)
    assert check_data(config) == VOCAB
    local = Loader(job([prefix], reset_attention=True), vocab_size=VOCAB, data_rank=0, data_size=1)
    far = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1)
    for a, b in islice(zip(local, far), 50):
        for x, y in zip(a.microbatches, b.microbatches, strict=True):
            assert torch.equal(x.tokens, y.tokens) and torch.equal(x.segments, y.segments)
    print(url, far.report())
    local.close(), far.close()
other = put("a", 2)  # another object under the same key is another file
data = IndexedDataset("s3://bucket/set/a", cache=remote.Cache(str(folder / "cache"), 1 << 24))
assert data.read(0, 700_000).tolist() == IndexedDataset(other).read(0, 700_000).tolist()
try:
    IndexedDataset("s3://bucket/none", cache=remote.Cache(str(folder / "cache"), 1 << 24))
except ValueError as error:
    print(error)
os._exit(0)  # the server's threads are of no interest any more
"""


def test_the_same_batches_from_s3(tmp_path):
    python = extra_python("moto", "s3fs", "flask", "flask_cors")
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    done = subprocess.run(
        [python, "-u", "-c", JOB, str(tmp_path)], env=environment(**keys), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, missing = (line for line in done.stdout.splitlines() if "s3://" in line)
    assert "reads were there" in first and " 0.0 MB fetched" not in first and "reads were there" in second
    assert "does not exist; data.paths" in missing
