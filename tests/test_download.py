"""scripts/download.sh against a server of this machine that behaves as Google Drive, plain hosts and broken ones do."""

import hashlib
import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from documentation import pages

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONTENT = bytes(range(256)) * 800
PAGE = "<!DOCTYPE html><html><head><title>{}</title></head><body>{}</body></html>"
FORM = ('<form id="download-form" action="{}/download" method="get"><input type="hidden" name="id" value="{}">'
        '<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t">\n'
        '<input type="hidden" name="uuid" value="5-7a"></form>')
ENTRY = ('<div class="flip-entry" id="entry-{0}" tabindex="0"><a href="{1}/{2}/{0}" target="_blank">'
         '<div class="flip-entry-title">{3}</div></a></div>\n')


class Host(BaseHTTPRequestHandler):
    """Files under /plain (with parts), /whole (without), /short (breaks off); /uc, /download and /embeddedfolderview as
    Google Drive's.
    """

    def do_GET(self):
        url = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.server.asked.append((url.path, self.headers["Range"]))
        here = f"http://{self.headers['Host']}"
        if url.path == "/uc":
            self.redirect(f"{here}/warning?id={asked['id']}")
        elif url.path == "/warning" and asked["id"] == "small":
            self.file(parts=True)
        elif url.path == "/warning" and asked["id"] == "quota":
            self.page(PAGE.format("Google Drive - Quota exceeded", ""))
        elif url.path == "/warning":
            self.page(PAGE.format("Google Drive - Virus scan warning", FORM.format(here, asked["id"])))
        elif url.path == "/download":
            right = asked == {"id": "large", "export": "download", "confirm": "t", "uuid": "5-7a"}
            self.file(parts=True) if right else self.page(PAGE.format("Sign in", ""))
        elif url.path == "/embeddedfolderview":
            self.page(self.listing(asked["id"], here))
        elif url.path in ("/plain", "/whole", "/short"):
            self.file(parts=url.path != "/whole", breaks_off=url.path == "/short")
        else:
            self.send_error(404)

    @staticmethod
    def listing(folder: str, here: str) -> str:
        entries = {"top": [("other", "drive/folders", "stable-diffusion"), ("inner", "drive/folders", "fid_stats")],
                   "inner": [("quota", "file/d", "other.npz"), ("small", "file/d", "some.npz")]}
        rows = [ENTRY.format(each, here, kind, name) for each, kind, name in entries[folder]]
        return PAGE.format("folder", "".join(rows))

    def file(self, parts: bool, breaks_off: bool = False) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "") if parts else None
        first = int(span[1]) if span else 0
        last = min(int(span[2] or len(CONTENT)), len(CONTENT) - 1) if span else len(CONTENT) - 1
        self.send_response(206 if span else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(last + 1 - first))
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[first:last + 1 if not breaks_off or last < 70_000 else 150_000])

    def page(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def redirect(self, url: str) -> None:
        self.send_response(303)
        self.send_header("Location", url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:  # a client that has seen enough hangs up
        pass


@pytest.fixture
def host():
    server = Server(("127.0.0.1", 0), Host)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(host, tmp_path):
    """Run the script with a table of one row, `thing`, whose link is on the server: (what bash says, the target)."""

    def run(link, inside="-", checksum="-", name="thing"):
        table, target = tmp_path / "table.tsv", tmp_path / "a folder/pretrained/thing.pth"
        link = f"http://127.0.0.1:{host.server_port}{link}" if link.startswith("/") else link
        table.write_text(f"# a comment\n\nthing\tpretrained/thing.pth\t{link}\t{inside}\t{checksum}\n")
        ran = subprocess.run([shutil.which("bash"), SCRIPTS / "download.sh", name], capture_output=True, text=True,
                             env={"PATH": "/usr/bin:/bin", "DATA": str(tmp_path / "a folder"), "TABLE": str(table)})
        return SimpleNamespace(status=ran.returncode, stdout=ran.stdout, stderr=ran.stderr, target=target, link=link,
                               part=target.with_name("thing.pth.part"))

    return run


@pytest.mark.parametrize(("link", "inside"), [
    ("/plain", "-"), ("/whole", "-"), ("/file/d/small/view", "-"), ("/file/d/large/view", "-"),
    ("/drive/folders/top", "fid_stats/some.npz"),
])
def test_fetches(download, host, link, inside):
    ran = download(link, inside)
    assert (ran.status, ran.stderr) == (0, "")
    assert ran.target.read_bytes() == CONTENT
    assert not ran.part.exists()
    asked = len(host.asked)
    again = download(link, inside)
    assert (again.status, again.stdout, len(host.asked)) == (0, f"{ran.target} is there\n", asked)


@pytest.mark.parametrize("link", ["/plain", "/file/d/large/view"])
def test_goes_on_where_it_was(download, host, link):
    target = download("/nowhere").target
    target.parent.mkdir(parents=True)
    target.with_name("thing.pth.part").write_bytes(CONTENT[:100_000])
    ran = download(link)
    assert (ran.status, ran.target.read_bytes()) == (0, CONTENT)
    assert host.asked[-1][1] == "bytes=100000-"
    assert f"100000 of {len(CONTENT)} bytes are here" in ran.stdout


@pytest.mark.parametrize(("link", "held"), [("/plain", CONTENT + b"of another file"), ("/whole", CONTENT[:100])])
def test_begins_anew_where_it_cannot_go_on(download, link, held):
    part = download("/nowhere").part
    part.parent.mkdir(parents=True)
    part.write_bytes(held)
    ran = download(link)
    assert (ran.status, ran.target.read_bytes()) == (0, CONTENT)


def test_a_download_that_breaks_off_is_no_file(download):
    ran = download("/short")
    assert ran.status == 1
    assert ran.stderr.endswith("error: thing: the download stopped; the same command goes on with it\n")
    assert not ran.target.exists()
    assert ran.part.read_bytes() == CONTENT[:150_000]
    assert download("/plain").target.read_bytes() == CONTENT


@pytest.mark.parametrize(("link", "inside", "why"), [
    ("/file/d/quota/view", "-", "the server sends a page instead: Google Drive - Quota exceeded"),
    ("/nowhere", "-", "the server answers with status 404"),
    ("/drive/folders/top", "fid_stats/absent.npz", "not found in the shared folder"),
    ("https://x.sharepoint.com/:f:/g/personal/y?e=z", "-", "a shared OneDrive folder opens in a browser only"),
    ("http://127.0.0.1:9/plain", "-", "curl: (7) Failed to connect"),
])
def test_a_refusal_tells_link_and_place(download, link, inside, why):
    ran = download(link, inside)
    where = f" ({inside})" if inside != "-" else ""
    assert ran.status == 1
    assert ran.stderr.startswith(f"error: thing: {why}")
    assert ran.stderr.endswith(f"; fetch it by hand: {ran.link}{where}; its place is {ran.target}\n")
    assert ran.stderr.count("\n") == 1
    assert not ran.target.exists()
    assert not ran.part.exists()


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_checksums(download, kind):
    right = hashlib.new(kind, CONTENT).hexdigest()[:32]  # of sha256, the first digits will do
    ran = download("/plain", checksum=f"{kind}:{right}")
    assert (ran.status, ran.stderr) == (0, "")
    ran.target.unlink()
    ran = download("/plain", checksum=f"{kind}:{right[::-1]}")
    assert (ran.status, ran.target.exists(), ran.part.exists()) == (1, False, False)
    assert ran.stderr.startswith(f"error: thing: what came has another checksum than {kind}:")


def test_unknown_name(download, host):
    ran = download("/plain", name="thingy")
    assert (ran.status, ran.stderr, host.asked) == (
        2, "error: 'thingy' is no published file; choose from thing\n", [])


def test_the_table():
    """Every row has its five fields; links are of kinds that the script knows; no two names or places are the same."""
    rows = [line.split("\t") for line in (SCRIPTS / "downloads.tsv").read_text().splitlines()
            if line and not line.startswith("#")]
    assert {len(row) for row in rows} == {5}
    names, places, links, inside, checks = zip(*rows, strict=True)
    assert len(set(names)) == len(set(places)) == len(rows)
    for link, path in zip(links, inside, strict=True):
        assert re.fullmatch(r"https?://[a-z.-]+/\S+", link)
        assert ("/drive/folders/" in link) == (path != "-")
        assert "drive.google.com" not in link or re.search(r"/(file/d/[\w-]+/view|drive/folders/[\w-]+)$", link)
    assert all(re.fullmatch(r"-|md5:[0-9a-f]{32}|sha256:[0-9a-f]{8,64}", check) for check in checks)
    models = {f"{path.stem.replace('mscoco_uvit_deep', 'mscoco_uvit_small_deep')}"
              for path in SCRIPTS.parent.glob("configs/*_uvit_*.py") if "_tiny" not in path.stem}
    assert models <= set(names)


def test_names_in_docstrings_and_documentation_are_in_the_table():
    known = {line.split("\t")[0] for line in (SCRIPTS / "downloads.tsv").read_text().splitlines()}
    used = set()
    for path in (*pages(), *SCRIPTS.parent.glob("configs/*.py")):
        for names in re.findall(r"^ *bash scripts/download\.sh ([^#\n]+)", path.read_text(), re.M):
            used |= set(names.split())
    assert len(used) >= 15
    assert used <= known
