"""The dashboards as a page without code, by the command that opens them."""
import importlib.util, os, sys
from pathlib import Path

import pytest
from lab import SHOTS, chromium, require_browser, running, until

@pytest.fixture(scope="module")
def address(tmp_path_factory):
    require_browser()
    if importlib.util.find_spec("voila") is None: (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("pages without code are Voila's: pip install voila")
    command = [Path(sys.executable).with_name("persona-steer"), "dashboard", "explorer", "--voila"]
    with running(command, tmp_path_factory.mktemp("page"), lambda port: f"http://localhost:{port}/voila/static/voila.js", BROWSER="true") as port: yield f"http://localhost:{port}/" # `true` opens no browser

def test_a_page_without_code(address):
    with chromium() as browser:
        page, outside, wrong = browser.new_page(viewport=dict(width=1000, height=1000)), [], []
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r))
        page.goto(address, timeout=60_000)
        title, slider = page.locator(".js-plotly-plot .gtitle"), page.locator(".noUi-handle").first
        title.wait_for(timeout=60_000)
        before = title.text_content()
        slider.focus(); page.keyboard.press("ArrowRight")
        until(lambda: title.text_content() != before, "another layer is drawn")
        assert "Run All Cells" not in page.locator(".jp-CodeCell").first.inner_text() and page.locator(".jp-InputArea-editor:visible").count() == 0
        SHOTS.mkdir(exist_ok=True); page.screenshot(path=SHOTS / "voila.png")
        left = {r.url: r.failure for r in outside if r.failure != "csp"} # those that the browser did not stop
        assert not (left or wrong), (left, wrong)
