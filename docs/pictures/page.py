"""page.png and page-dark.png: the page of a server that runs, with an answer and the experts of one of its tokens.

    python docs/pictures/page.py http://127.0.0.1:8000 ["a prompt"]

They show what a model said, so they are not drawn anew by draw.py. Wants Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

from browser import browsing
from PIL import Image
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

HERE = Path(__file__).parent
NAMES = ("page.png", "page-dark.png")
SECONDS = 300  # for an answer
COLORS = 64  # of the picture: a page has few, and the file stays small


def take(driver: Chrome, url: str, prompt: str, picture: Path) -> None:
    wait = WebDriverWait(driver, SECONDS)
    driver.get(url)
    wait.until(lambda _: driver.find_element(By.ID, "model").text != "no model yet")
    driver.find_element(By.ID, "prompt").send_keys(prompt, Keys.ENTER)
    wait.until(lambda _: driver.find_elements(By.CSS_SELECTOR, ".figures"))
    tokens = driver.find_elements(By.CSS_SELECTOR, "article.assistant > .text > .token")
    tokens[len(tokens) // 2].click()
    driver.execute_script("document.activeElement.blur()")
    shot = base64.b64decode(driver.get_screenshot_as_base64())
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(COLORS).save(picture, optimize=True)


def main() -> None:
    url, *prompt = sys.argv[1:]
    for name in NAMES:
        with browsing(is_dark="dark" in name) as driver:
            take(driver, url, " ".join(prompt) or "What is a draft?", HERE / name)
        print(HERE / name)


if __name__ == "__main__":
    main()
