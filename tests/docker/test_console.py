"""The console in a real browser: Debian's Chromium, driven by Selenium, against a service on the real engine."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.live import Live, open_folder, serve

ROOT = Path(__file__).parents[2]
KEY = "console-0123456789abcdef"
WAIT_S = 60.0
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="  # a PNG of one
Page = webdriver.Chrome


@pytest.fixture(scope="module")
def chromium() -> tuple[str, str]:
    """Paths of Chromium and its driver; on CI they are installed, elsewhere their absence skips."""
    if shutil.which("chromedriver") is None:
        installed = subprocess.run([ROOT / "scripts" / "apt.sh", "chromium", "chromium-driver"], check=False)
        if installed.returncode == 3:
            pytest.skip("chromium and chromium-driver are not installed, and cannot be from here")
        installed.check_returncode()
    return str(shutil.which("chromium")), str(shutil.which("chromedriver"))


@pytest.fixture(scope="module")
def live(real_engine: None) -> Iterator[Live]:
    """A service that asks for a key."""
    settings = {"api_keys": f"console:{KEY}", "uid_base": "52600", "pool_size": "1"}
    with open_folder() as folder, serve(folder, instance="test-console", engine="docker", **settings) as live:
        yield live


@pytest.fixture(scope="module")
def page(live: Live, chromium: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The console with a session, in a browser that has the key."""
    options = webdriver.ChromeOptions()
    options.binary_location = chromium[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1500"):
        options.add_argument(argument)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(chromium[1]))
    try:
        driver.get(f"{live.url}/")
        until(driver, lambda: find(driver, "key").is_displayed())
        find(driver, "key").send_keys("wrong", Keys.ENTER)
        until(driver, lambda: "not valid" in find(driver, "key-error").text)
        find(driver, "key").send_keys(KEY, Keys.ENTER)
        until(driver, lambda: Select(find(driver, "template")).options)
        driver.find_element(By.CSS_SELECTOR, "#new-session button").click()
        until(driver, lambda: find(driver, "work").is_displayed())
        yield driver
    finally:
        driver.quit()


def find(page: Page, element: str) -> WebElement:
    """Return an element by its id."""
    return page.find_element(By.ID, element)


def until(page: Page, holds: Callable[[], object]) -> None:
    """Wait until something holds of the page."""
    WebDriverWait(page, WAIT_S, 0.1).until(lambda _: holds())


def run(page: Page, code: str, language: str = "python") -> str:
    """Type code, run it, return what the page shows at its end."""
    Select(find(page, "language")).select_by_value(language)
    find(page, "code").clear()
    find(page, "code").send_keys(code)
    find(page, "run").click()
    until(page, lambda: " in " in find(page, "outcome").text and find(page, "run").is_enabled())
    return find(page, "output").text


def test_a_handler_is_written_and_its_value_seen(page: Page) -> None:
    output = run(page, "def handler(event):\n    print('said')\n    return {'hello': event['name']}")
    assert "said" in output
    assert '→ {"hello":"World"}' in output
    assert find(page, "outcome").text.startswith("ok in ")


def test_output_is_shown_while_the_code_runs_and_it_can_be_stopped(page: Page) -> None:
    find(page, "code").clear()
    find(page, "code").send_keys("import time\nprint('first', flush=True)\ntime.sleep(60)")
    find(page, "run").click()
    until(page, lambda: "first" in find(page, "output").text)
    assert not find(page, "run").is_enabled()
    find(page, "stop").click()
    until(page, lambda: find(page, "outcome").text.startswith("cancelled"))


def test_an_error_is_shown_as_one(page: Page) -> None:
    run(page, "1/0")
    assert "ZeroDivisionError" in "".join(part.text for part in page.find_elements(By.CSS_SELECTOR, "#output .stderr"))


def test_markup_in_output_is_text(page: Page) -> None:
    assert "<img src=x>" in run(page, "print('<img src=x>')")
    assert page.find_elements(By.CSS_SELECTOR, "#output img") == []


def test_variables_are_kept_and_images_are_shown(page: Page) -> None:
    find(page, "keep").click()
    run(page, "x = 41")
    assert "42" in run(page, "x + 1")
    run(page, f"import base64\nfrom IPython.display import Image\nImage(base64.b64decode('{PIXEL}'))")
    image = page.find_element(By.CSS_SELECTOR, "#output img")
    until(page, lambda: image.get_property("naturalWidth") == 1)
    find(page, "keep").click()


def test_files_go_up_and_down(page: Page, tmp_path: Path) -> None:
    (tmp_path / "up.txt").write_text("from here")
    find(page, "upload").send_keys(str(tmp_path / "up.txt"))
    until(page, lambda: "up.txt" in find(page, "files").text)
    assert "from here" in run(page, "print(open('up.txt').read())")
    page.find_element(By.XPATH, "//table[@id='files']//tr[contains(., 'up.txt')]//button[text()='Delete']").click()
    until(page, lambda: "up.txt" not in find(page, "files").text)


def test_the_terminal_takes_what_is_typed(page: Page) -> None:
    find(page, "terminal-open").click()
    until(page, lambda: "$" in find(page, "terminal").text)
    find(page, "terminal").send_keys("echo $((6 * 7))", Keys.ENTER)
    until(page, lambda: "\n42" in find(page, "terminal").text)
    find(page, "terminal").send_keys("exit", Keys.ENTER)
    until(page, lambda: "[ended with 0]" in find(page, "terminal").text)


def test_the_api_can_be_browsed_with_the_same_key(page: Page) -> None:
    page.find_element(By.LINK_TEXT, "API").click()
    until(page, lambda: "POST /v1/sessions" in find(page, "operations").text)


def test_nothing_was_blocked_or_broke(page: Page) -> None:
    """Runs last: neither the content security policy nor a script complained."""
    log = page.get_log("browser")  # type: ignore[no-untyped-call]
    # Answers such as 401, for the key that was wrong on purpose, are of the network.
    assert [] == [entry for entry in log if entry["level"] == "SEVERE" and entry["source"] != "network"]
