"""Draw the pictures of docs/tensorboard.md, which tells how its runs are made: TensorBoard's pages, in a headless
Chromium.

python docs/draw_tensorboard.py --runs runs/pictures
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, TypeVar

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

Found = TypeVar("Found")
BROWSERS, DRIVER = ("chromium", "chromium-browser", "google-chrome"), "chromedriver"
# TensorBoard is made of elements whose insides a plain search does not enter.
SEARCH = """
const found = [];
const search = (root) => {
  found.push(...root.querySelectorAll(arguments[0]));
  root.querySelectorAll("*").forEach((element) => element.shadowRoot && search(element.shadowRoot));
};
search(arguments[1] ? arguments[1].shadowRoot || arguments[1] : document);
return found;
"""
ROWS = """
return [...arguments[0].shadowRoot.querySelectorAll("tr")].map((row) =>
  [...row.querySelectorAll("slot")].map((cell) => cell.assignedElements().map((e) => e.innerText.trim()).join("")));
"""


def missing() -> str | None:
    """What a page cannot be looked at without, if it is not installed."""
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium is installed: apt-get install chromium chromium-driver"
    return None if shutil.which(DRIVER) else f"no {DRIVER} is installed: apt-get install chromium-driver"


@contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """The address of the TensorBoard that `command` starts. Raises RuntimeError, with what it said, if it ends."""
    with TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while not (found := re.search(r"http://localhost:\d+/", log.read_text())):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                    raise RuntimeError(f"TensorBoard ended: {log.read_text()}")
            yield found[0]
        finally:
            process.terminate()
            process.wait()


class Page:
    """TensorBoard in a browser without a window.

    Args:
        address: of TensorBoard.
        size: width and height, in pixels.
        patience: seconds after which what is waited for will not come.
    """

    def __init__(self, address: str, size: tuple[int, int] = (1400, 900), patience: float = 120) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(next(filter(None, map(shutil.which, BROWSERS))))
        # a container has neither the user that the sandbox asks for, nor much of /dev/shm
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(flag)
        self.address, self.patience = address, patience
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which(DRIVER)))
        self.resize(*size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.driver.quit()

    def resize(self, width: int, height: int) -> None:
        """Of what is to be seen, in pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def open(self, tab: str, query: str = "") -> None:
        """Load a tab anew: timeseries, scalars, custom_scalars, text, hparams; `query` is for what it selects."""
        self.driver.get("about:blank")  # another part behind the # alone would load nothing
        self.driver.get(f"{self.address}{query}#{tab}")

    def find(self, selector: str, inside: WebElement | None = None) -> list[WebElement]:
        """The elements of a CSS selector, wherever they are."""
        return self.driver.execute_script(SEARCH, selector, inside)

    def wait(self, condition: Callable[[], Found]) -> Found:
        """What `condition` gives once it is true. Raises TimeoutException, with what is to be seen, if it never is."""
        gone = (StaleElementReferenceException, IndexError)  # while the page is built
        try:
            return WebDriverWait(self.driver, self.patience, 0.2, gone).until(lambda _: condition())
        except TimeoutException as late:
            late.msg = f"after {self.patience} s there was only: {self.driver.find_element('tag name', 'body').text}"
            raise

    def save(self, path: Path) -> None:
        """A picture of what is to be seen."""
        picture = Image.open(BytesIO(self.driver.get_screenshot_as_png()))
        picture.convert("RGB").quantize(128).save(path, optimize=True)

    def curves(self) -> dict[str, list[str]]:
        """In TIME SERIES: of every card in sight the runs whose last value it tells."""
        return {
            self._words("tb-truncated-path", card).replace(" ", ""): [
                row.text.split()[0] for row in self.find("tb-data-table-content-row", card) if row.text
            ]
            for card in self.find("scalar-card")
        }

    def charts(self) -> dict[str, list[str]]:
        """In CUSTOM SCALARS: of every chart that shows a curve, what its curves are of; outliers may lie outside."""
        found = {}
        for chart in self.find("tf-custom-scalar-multi-line-chart-card"):
            names = [name.get_attribute("textContent") or "" for name in self.find(".match-list-entry", chart)]
            lines = [line.get_attribute("d") for line in self.find(".line-plot:not(.ghost) path.line", chart)]
            if any(lines):
                found[self._words("[itemprop=name]", chart)] = [" ".join(name.split()[1:]) for name in names]
        return found

    def trials(self) -> list[dict[str, str]]:
        """In HPARAMS: the rows of the table, by the titles of their columns."""
        grids = self.find("vaadin-grid")
        rows = self.driver.execute_script(ROWS, grids[0]) if grids else []
        titles = next((row for row in rows if row[0] == "Trial ID"), [])
        # behind the last column there may be room for what is unfolded
        return [dict(zip(titles, row, strict=False)) for row in rows if row[0] and row != titles]

    def written(self) -> dict[tuple[str, str], list[str]]:
        """In TEXT: of every card in sight its texts, the last step first, by run and tag."""
        return {
            (self._words("[itemprop=run]", card), self._words("[itemprop=tag]", card)): [
                text.get_attribute("textContent") or "" for text in self.find("code", card)
            ]
            for card in self.find("tf-text-loader")
        }

    def _words(self, selector: str, inside: WebElement) -> str:
        return " ".join(self.find(selector, inside)[0].text.split())


def draw(page: Page, count: int, folder: Path) -> None:
    """Write the pictures of `count` runs to a folder."""
    page.resize(1400, 620)
    page.open("timeseries", "?tagFilter=(train|val)/loss&smoothing=0")
    page.wait(lambda: [len(runs) for runs in page.curves().values()] == [count] * 2)
    next(button for button in page.find("button") if button.get_attribute("aria-label") == "Close side pane").click()
    page.save(folder / "tensorboard-scalars.png")

    page.resize(1080, 1920)
    page.open("custom_scalars")
    page.wait(lambda: len(page.charts()) == len(page.find("tf-custom-scalar-multi-line-chart-card")) > 1)
    page.save(folder / "tensorboard-custom-scalars.png")

    page.resize(1750, 1500)  # room to click
    page.open("hparams")
    page.wait(lambda: len(page.trials()) == count)
    for box in page.find("paper-checkbox"):
        if box.text in ("parameters", "peak_lr", "seed"):  # the same in all of them, or not to be seen besides
            box.click()
    page.wait(lambda: "val/loss" in page.trials()[0] and "seed" not in page.trials()[0])
    page.resize(1750, 330)
    page.save(folder / "tensorboard-hparams.png")

    page.resize(1300, 720)
    page.open("text&tagFilter=samples&regexInput=/rat$")
    page.wait(lambda: page.written() and all(page.written().values()))
    page.save(folder / "tensorboard-text.png")


def main() -> None:
    """Draw what --runs holds; one of its runs has to be called rat."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/tensorboard.md.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the pictures")
    options = parser.parse_args()
    count = len({path.parent for path in options.runs.rglob("events.out.tfevents.*")})
    if not count or (reason := missing()):
        sys.exit(f"{options.runs} holds no runs: make quickstart, or --runs FOLDER" if not count else reason)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(options.runs), "--port", "0"]
    with serving(command) as address, Page(address) as page:
        draw(page, count, options.output)


if __name__ == "__main__":
    main()
