"""Files of data sets: read from a folder or downloaded from a server on this machine, verified."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from seqdgm import datasets
from seqdgm.datasets import fetch, loaders, registry

NUMBERS = b"1.5\n2.5\n3.5\n"
ENTRY = {
    "description": "three numbers",
    "loader": "numbers",
    "files": ["some/numbers.dat"],
    "n_series": 1,
    "n_dims": 1,
    "length": 3,
    "season": 1,
    "split": "none",
    "options": {"columns": ["x"]},
    "source": "this test",
}


class Serve(BaseHTTPRequestHandler):
    """Gives the same bytes to all, or announces more than it sends."""

    def __init__(self, body, announced, requests, *args):
        self.body, self.announced, self.requests = body, announced, requests
        super().__init__(*args)

    def do_GET(self):
        self.requests.append(self.path)
        self.send_response(200 if self.body else 404)
        self.send_header("Content-Length", str(self.announced))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.fixture
def public(monkeypatch, tmp_path):
    """A registry of one set, an empty cache, and what is said of the file."""
    monkeypatch.delenv("SEQDGM_DATA", raising=False)
    monkeypatch.setattr(fetch, "_cache", lambda: tmp_path / "cache")
    about = {
        "url": "http://127.0.0.1:9/numbers.dat",
        "sha256": hashlib.sha256(NUMBERS).hexdigest(),
        "bytes": len(NUMBERS),
        "licence": "none needed",
    }
    for module in (fetch, registry):
        monkeypatch.setattr(module, "public_files", lambda: {"some/numbers.dat": about})
    monkeypatch.setattr(loaders, "entry", lambda name: ENTRY)
    return about


@pytest.fixture
def serve(public):
    servers = []

    def start(body, announced=None):
        requests: list[str] = []
        length = len(body) if announced is None else announced
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Serve, body, length, requests))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        public["url"] = f"http://127.0.0.1:{server.server_port}/numbers.dat"
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def failure() -> str:
    with pytest.raises(datasets.DatasetUnavailableError) as caught:
        datasets.load("three")
    text = str(caught.value)
    assert "\n" not in text
    assert "'three'" in text
    assert "some/numbers.dat" in text
    assert "SEQDGM_DATA" in text
    return text


def left_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_is_downloaded_once(serve, tmp_path):
    requests = serve(NUMBERS)
    for _ in range(2):
        np.testing.assert_array_equal(datasets.load("three").y, [1.5, 2.5, 3.5])
    assert requests == ["/numbers.dat"]
    assert left_in(tmp_path / "cache") == [tmp_path / "cache" / "some" / "numbers.dat"]


def test_a_damaged_file_in_the_cache_is_replaced(serve, tmp_path):
    requests = serve(NUMBERS)
    datasets.load("three")
    (tmp_path / "cache" / "some" / "numbers.dat").write_bytes(NUMBERS[:5])
    np.testing.assert_array_equal(datasets.load("three").y, [1.5, 2.5, 3.5])
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("body", "announced", "said"),
    [
        (b"9.5\n2.5\n3.5\n", None, "not the published file"),
        (NUMBERS[:6], None, "not the published file"),
        (NUMBERS[:6], len(NUMBERS), "IncompleteRead"),
        (b"", None, "404"),
    ],
    ids=["other", "short", "cut off", "gone"],
)
def test_a_bad_download_leaves_nothing(serve, tmp_path, body, announced, said):
    serve(body, announced)
    text = failure()
    assert said in text
    assert left_in(tmp_path / "cache") == []


def test_without_a_network_one_line_says_so(public, tmp_path):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        public["url"] = f"http://127.0.0.1:{taken.getsockname()[1]}/numbers.dat"
        assert "ConnectionError" in failure()
    assert left_in(tmp_path / "cache") == []


def test_a_folder_is_read_in_place_of_downloading(public, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQDGM_DATA", str(tmp_path / "mine"))
    assert "not a folder" in failure_of_folder()
    (tmp_path / "mine" / "some").mkdir(parents=True)
    assert public["url"] in failure()
    file = tmp_path / "mine" / "some" / "numbers.dat"
    file.write_bytes(NUMBERS[:-1])
    assert "not the published file" in failure()
    file.write_bytes(NUMBERS)
    np.testing.assert_array_equal(datasets.load("three").y, [1.5, 2.5, 3.5])
    assert not (tmp_path / "cache").exists()


def failure_of_folder() -> str:
    with pytest.raises(datasets.DatasetUnavailableError) as caught:
        datasets.load("three")
    return str(caught.value)


def test_a_file_without_an_address_says_how_to_get_it(public, monkeypatch, tmp_path):
    del public["url"]
    public["obtain"] = "ask the author"
    assert "ask the author" in failure()
    monkeypatch.setenv("SEQDGM_DATA", str(tmp_path))
    assert "ask the author" in failure()


def test_presence_is_told_without_a_download(public, monkeypatch, tmp_path):
    assert not fetch.is_present(ENTRY)
    monkeypatch.setenv("SEQDGM_DATA", str(tmp_path))
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "numbers.dat").write_bytes(NUMBERS)
    assert fetch.is_present(ENTRY)


def test_every_entry_has_what_it_needs():
    known, named = registry.public_files(), set()
    for entry in registry.registry().values():
        assert ("file" in entry) != ("files" in entry)
        if "files" in entry:
            named |= set(entry["files"])
            assert entry["loader"] in loaders.READERS
            rule = entry["split"]
            assert rule in ("given", "none", "horizon") or len(rule) == 3
            assert rule != "horizon" or entry["horizon"] > 0
    assert named == set(known)
    for about in known.values():
        assert ("url" in about) != ("obtain" in about)
        assert about.get("url", "https://").startswith("https://")
        assert len(bytes.fromhex(about["sha256"])) == 32
        assert about["bytes"] > 0
        assert about["licence"]


def test_the_list_names_licences_and_needs_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQDGM_DATA", os.devnull)
    table = datasets.list().set_index("name")
    assert table["licence"].str.len().min() > 0
    assert table["present"].equals(table["origin"] == "package")
