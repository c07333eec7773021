"""The page in Chromium: nothing is asked for, nothing fails, nothing is wider than the screen."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

from rect_lightning import reports
from tests.reports.samples import write_grid, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
pytest.importorskip("matplotlib")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--allow-file-access-from-files",
)  # fmt: skip

CHECK = """
const told = { errors: [] };
addEventListener("error", (event) => told.errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => told.errors.push(event.violatedDirective));
addEventListener("load", () => {
  document.querySelectorAll("details").forEach((details) => { details.open = true; });
  const root = document.documentElement;
  told.width = innerWidth;
  told.content = root.scrollWidth;
  told.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  told.before = getComputedStyle(document.body).backgroundColor;
  document.querySelector("button.theme").click();
  told.after = getComputedStyle(document.body).backgroundColor;
  told.saves = document.querySelectorAll(".tools button").length;
  told.levels = [...document.querySelectorAll("h1, h2, h3")].map((heading) => Number(heading.tagName[1]));
  root.dataset.told = JSON.stringify(told);
  if (parent !== window) parent.document.documentElement.dataset.told = root.dataset.told;
});
"""


@pytest.fixture(scope="module", params=["run", "grid"])
def page(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    {"run": write_run, "grid": write_grid}[request.param](folder)
    reports.report(folder)
    return folder / "report.html"


@pytest.mark.parametrize(("width", "theme"), [(360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")])
def test_a_page_is_sound_at_any_width(page, width, theme, tmp_path):
    digest = base64.b64encode(hashlib.sha256(CHECK.encode()).digest()).decode()
    html = page.read_text(encoding="utf-8")
    html = html.replace("script-src ", f"script-src 'sha256-{digest}' ").replace(
        "<style>", f"<script>{CHECK}</script><style>", 1
    )
    html = html.replace('<html lang="en">', f'<html lang="en" data-theme="{theme}">')
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    # a window is never narrower than 500 pixels, a frame may be
    frame = tmp_path / "frame.html"
    frame.write_text(f'<body style="margin:0"><iframe src="page.html" style="border:0;width:{width}px;height:3000px">')
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(500, width)},3000"]
    command += [f"--screenshot={tmp_path / 'page.png'}", "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(re.search(r'<html data-told="([^"]+)"', done.stdout)[1].replace("&quot;", '"'))
    assert told["errors"] == []
    assert told["requests"] == []
    assert told["width"] == width
    assert told["content"] <= width
    dark, light = "rgb(21, 23, 27)", "rgb(253, 253, 252)"
    assert (told["before"], told["after"]) == ((dark, light) if theme == "dark" else (light, dark))
    assert told["saves"] >= 6
    assert told["levels"][0] == 1
    assert all(b - a <= 1 for a, b in zip(told["levels"], told["levels"][1:], strict=False)), "no level is skipped"
    assert (tmp_path / "page.png").stat().st_size > 20_000
