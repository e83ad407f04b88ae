"""The built site, in a browser: no error on the console, no request to elsewhere, and
every formula rendered."""

import functools as ft
import http.server
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest


pytestmark = pytest.mark.process

_root = pathlib.Path(__file__).parent.parent
_pages = [
    page.relative_to(_root / "docs").as_posix()
    for page in sorted((_root / "docs").rglob("*.md"))
]
_browsers = "chromium", "chromium-browser", "google-chrome"
_browser = next(filter(None, map(shutil.which, _browsers)), None)


class Handler(http.server.SimpleHTTPRequestHandler):
    def end_headers(self):
        # A request to another host is an error on the console then.
        sources = "'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
        self.send_header("Content-Security-Policy", f"default-src {sources}")
        super().end_headers()

    def log_request(self, code="-", size="-"):
        getattr(self.server, "answers").append((int(code), self.path))

    def log_message(self, format, *args):
        del format, args


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if _browser is None:
        pytest.skip(f"none of {', '.join(_browsers)} is installed")
    pytest.importorskip("mkdocs", reason='needs `pip install -e ".[docs]"`')
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(build, cwd=_root, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    handler = ft.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.answers = []  # pyright: ignore[reportAttributeAccessIssue]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def load(server, path, profile):
    """The page as the browser has it in the end, and what is on its console."""
    assert _browser is not None
    server.answers.clear()
    done = subprocess.run(
        [
            _browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--virtual-time-budget=10000",
            "--dump-dom",
            f"http://127.0.0.1:{server.server_port}/{path}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


@pytest.mark.parametrize("page", _pages)
def test_page_loads(site, page, tmp_path):
    path = re.sub(r"(index)?\.md$", "", page)
    html, console = load(
        site, path if path.endswith("/") or not path else f"{path}/", tmp_path
    )
    assert console == []
    assert [answer for answer in site.answers if answer[0] >= 400] == []
    assert any(path.endswith("katex.min.js") for _, path in site.answers)
    formulas = re.findall(r'class="arithmatex">(.{0,30})', html, re.S)
    assert [text for text in formulas if not text.lstrip().startswith("<span")] == []
    assert "katex-error" not in html
    # A formula that was not even recognised as one.
    hidden = r"<(pre|code|script|style|annotation)\b.*?</\1>"
    assert "$" not in re.sub(hidden, "", html, flags=re.S)


def test_errors_are_noticed(site, tmp_path):
    folder = pathlib.Path(site.RequestHandlerClass.keywords["directory"])
    (folder / "bad.html").write_text(
        '<img src="https://example.org/a.png"><img src="missing.png">'
        "<script>throw new Error('oh')</script>"
    )
    _, console = load(site, "bad.html", tmp_path)
    assert any("Content Security Policy" in line for line in console)
    assert any("oh" in line for line in console)
    assert (404, "/missing.png") in site.answers
