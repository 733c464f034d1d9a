"""What the tests of the reports share: a page's tags and text, and a page asked in a headless Chromium."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

# Runs before the page's own script. ASK is the body of an async function; what it returns joins the answer.
WATCH = """<script>
const problems = [];
addEventListener("error", (event) => problems.push(event.message || event.target.outerHTML), true);
addEventListener("securitypolicyviolation", (event) => problems.push("blocked " + event.blockedURI));
console.error = console.warn = (...words) => problems.push("console: " + words.join(" "));
addEventListener("load", async () => {
  const asked = await (async () => { ASK })().catch((error) => problems.push("asking: " + error));
  parent.postMessage({
    ...asked, problems, title: document.title,
    width: innerWidth, wanted: document.documentElement.scrollWidth,
    requests: performance.getEntriesByType("resource").filter((one) => !one.name.startsWith("data:")).length,
    background: getComputedStyle(document.body).backgroundColor, color: getComputedStyle(document.body).color,
  }, "*");
});
</script>"""


class Page(HTMLParser):
    """Tags, attributes and text of a page, and whether every tag that was opened is closed in order."""

    VOID = ("meta", "link", "img", "br", "line", "polyline", "circle", "use", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


class Listener(BaseHTTPRequestHandler):
    """Takes the one answer that the browser sends."""

    server: Any

    def do_POST(self) -> None:
        self.server.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def in_browser(
    command: list[str], page: Path, widths: tuple[int, ...], ask: str = "return {};"
) -> list[dict[str, Any]]:
    """Open the page in frames of these widths (a headless window is never below 500 pixels) and ask it.

    The answers come to a socket of this machine: --dump-dom would have to guess when the page is done.
    """
    server: Any = HTTPServer(("127.0.0.1", 0), Listener)
    server.answers = queue.Queue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    html, watch = page.read_text(encoding="utf-8"), WATCH.replace("ASK", ask)
    page.with_name("watched.html").write_text(html.replace("<title>", watch + "<title>", 1), encoding="utf-8")
    frames = "".join(f'<iframe src="watched.html" width="{width}" height="900"></iframe>' for width in widths)
    wrapper = page.with_name("wrapper.html")
    wrapper.write_text(
        "<!doctype html><script>const told = [];"
        "addEventListener('message', (event) => { told.push(event.data);"
        f"if (told.length === {len(widths)}) fetch('http://127.0.0.1:{server.server_port}/',"
        "{ method: 'POST', mode: 'no-cors', body: JSON.stringify(told) }); });"
        f"</script><body>{frames}</body>"
    )
    output = page.with_name("chromium.log")
    with output.open("w") as log:
        browser = subprocess.Popen(
            [*command, "--remote-debugging-port=0", wrapper.as_uri()], stdout=log, stderr=log
        )
        try:
            answers = json.loads(server.answers.get(timeout=120))
        except queue.Empty:
            pytest.fail(f"the page said nothing in 120 seconds; chromium said: {output.read_text()[-2000:]}")
        finally:
            browser.kill()
            browser.wait()
            server.shutdown()
            server.server_close()
    return sorted(answers, key=lambda answer: answer["width"])
