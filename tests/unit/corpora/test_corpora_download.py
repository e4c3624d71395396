"""Fetching files from a server that this test runs."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
import zipfile

import pytest

from megatron.data.corpora import download
from megatron.data.corpora.download import fetch, unpack
from megatron.errors import DataError

BODY = bytes(range(256)) * 40_000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY, in pieces if told to; notes what was asked of it."""

    def do_GET(self):
        state = self.server.state
        state["asked"].append(self.headers.get("Range"))
        if self.path != "/some%20file.jsonl":
            self.send_error(404)
            return
        start = 0
        asked = self.headers.get("Range")
        if asked and state["continues"] and self.headers.get("If-Range") == state["etag"]:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.send_header("ETag", state["etag"])
        self.end_headers()
        stop = state["breaks"].pop(0) if state["breaks"] else len(BODY)
        self.wfile.write(BODY[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.state = {"asked": [], "continues": True, "etag": '"one"', "breaks": []}
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/some%20file.jsonl"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def quiet(_: str) -> None:
    pass


def test_a_file_arrives_whole_and_once(server, tmp_path):
    path = fetch(server.url, tmp_path / "raw", say=quiet)
    assert path == tmp_path / "raw" / "some file.jsonl"
    assert path.read_bytes() == BODY
    assert [entry.name for entry in path.parent.iterdir()] == ["some file.jsonl"]
    fetch(server.url, tmp_path / "raw", say=quiet)
    assert len(server.state["asked"]) == 1


def test_a_broken_transfer_is_continued(server, tmp_path):
    server.state["breaks"] = [3_000_000, 7_000_000]
    path = fetch(server.url, tmp_path, say=quiet)
    assert path.read_bytes() == BODY
    assert server.state["asked"] == [None, "bytes=3000000-", "bytes=7000000-"]


def test_the_next_call_continues_too(server, tmp_path):
    server.state["breaks"] = [1_000, 2_000, 3_000]
    with pytest.raises(DataError, match="same command continues"):
        fetch(server.url, tmp_path, say=quiet)
    assert not (tmp_path / "some file.jsonl").exists()
    assert fetch(server.url, tmp_path, say=quiet).read_bytes() == BODY
    assert server.state["asked"][-1] == "bytes=3000-"


@pytest.mark.parametrize("change", [{"continues": False}, {"etag": '"two"'}])
def test_a_changed_or_stubborn_server_starts_over(server, tmp_path, change):
    server.state["breaks"] = [5_000]
    with pytest.raises(DataError):
        fetch(server.url, tmp_path, say=quiet, tries=1)
    server.state.update(change)
    assert fetch(server.url, tmp_path, say=quiet).read_bytes() == BODY


def test_a_missing_file_is_told(server, tmp_path):
    with pytest.raises(DataError, match=r"answered 404.*--source"):
        fetch(server.url + "x", tmp_path, say=quiet)


def test_no_network_is_told(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"cannot fetch .*--source"):
        fetch(server.url, tmp_path, say=quiet)


def test_a_wrong_hash_is_not_kept(server, tmp_path):
    right = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(DataError, match="SHA-256"):
        fetch(server.url, tmp_path, sha256="0" * 64, say=quiet)
    assert not list(tmp_path.glob("*.jsonl*"))
    assert fetch(server.url, tmp_path, sha256=right, name="b", say=quiet) == tmp_path / "b"


def test_local_paths_and_file_addresses(tmp_path):
    source = tmp_path / "x y.jsonl"
    source.write_bytes(b"abc")
    assert fetch(str(source), tmp_path / "a", say=quiet).read_bytes() == b"abc"
    assert fetch(source.as_uri(), tmp_path / "b", say=quiet).read_bytes() == b"abc"
    with pytest.raises(DataError, match="cannot fetch"):
        fetch(str(tmp_path / "none"), tmp_path / "c", say=quiet)


def test_archives_are_unpacked_once(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("in/enwik8", "text")
    files = unpack(archive, tmp_path / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in files] == ["out/in/enwik8"]
    archive.write_bytes(b"changed since")
    assert unpack(archive, tmp_path / "out") == files


def test_other_files_pass(tmp_path):
    assert unpack(tmp_path / "a.jsonl.zst", tmp_path / "out") == [tmp_path / "a.jsonl.zst"]


def test_a_tar_that_leaves_its_folder_is_refused(tmp_path):
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("../outside")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "outside").exists()
    assert not (tmp_path / "deep" / "out").exists()


def test_a_damaged_archive_is_told(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match="cannot be unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
