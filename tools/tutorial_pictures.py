"""Take the pictures of docs/tutorial.md from the page that its last step writes.

    python tools/tutorial_pictures.py run.html

Wants Chromium and its driver (Debian: chromium, chromium-driver). Nothing is fetched.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import time
from pathlib import Path

from selenium import webdriver

DOCS = Path(__file__).resolve().parents[1] / "docs"
WIDTH = 1100
# Sections of the page, by the name of the picture.
PICTURES = {"tutorial-texts.png": "matrix", "tutorial-losses.png": "losses"}


def take(page: Path) -> None:
    """Write each picture."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    driver = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=driver)
    try:
        metrics = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.absolute().as_uri())
        while browser.execute_script("return document.body.dataset.ready") != "yes":
            time.sleep(0.1)
        for name, section in PICTURES.items():
            box = browser.execute_script(
                "const b = document.getElementById(arguments[0]).getBoundingClientRect();"
                "return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}",
                section,
            )
            shot = browser.execute_cdp_cmd(
                "Page.captureScreenshot",
                {"format": "png", "captureBeyondViewport": True, "clip": {**box, "scale": 1}},
            )
            (DOCS / name).write_bytes(base64.b64decode(shot["data"]))
    finally:
        browser.quit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    take(parser.parse_args().page)
