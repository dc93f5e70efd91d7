"""The report in headless Chromium, opened from disk: films play in step, the divider moves, columns sort, keys work."""
import base64
import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, BROWSERS), None)
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
if not CHROMIUM or not DRIVER:
    pytest.skip("Chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)",
                allow_module_level=True)
pytest.importorskip("paddle", reason="PaddlePaddle is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))

from planted import SwapHeads  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from toy_pipeline import ToyPipeline  # noqa: E402

from lowbit_video.eval.compare.candidates import Candidate  # noqa: E402
from lowbit_video.eval.compare.layers import measure_layers  # noqa: E402
from lowbit_video.eval.compare.paired import compare  # noqa: E402
from lowbit_video.eval.compare.settings import Settings  # noqa: E402
from lowbit_video.eval.report.write import write_report  # noqa: E402

PROMPTS = ["a red ball", "two blue squares", "one green star"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A browser with the report open as a file."""
    folder, pipe = tmp_path_factory.mktemp("page"), ToyPipeline()
    settings, quiet = Settings("toy", steps=2), lambda line: None
    candidates = ["int8+fp16", Candidate("swap", SwapHeads)]
    compare(pipe, PROMPTS, candidates, folder, settings=settings, metrics=["psnr", "ssim"], say=quiet)
    measure_layers(pipe, PROMPTS[0], ["int8+fp16", "int2+fp16"], settings=settings, measured_shares=False,
                   say=quiet).save(folder / "layers.npz")
    path = write_report(folder, say=quiet)["html"]
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,1000",
                     "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get(path.as_uri())
    wait(driver, "video.readyState >= 2")
    yield driver
    driver.quit()


def wait(driver, condition, seconds=20):
    WebDriverWait(driver, seconds).until(lambda d: d.execute_script(f"return {condition}"))


def pixels(driver):
    """The canvas as the page shows it: [H, W, 3]."""
    import imageio.v3 as iio

    url = driver.execute_script("draw(); return canvas.toDataURL('image/png')")
    return iio.imread(io.BytesIO(base64.b64decode(url.partition(",")[2])))[..., :3].astype(int)


def test_no_error_is_logged(page):
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_video_plays_and_pauses(page):
    button = page.find_element(By.ID, "play")
    button.click()
    start = page.execute_script("return video.currentTime")
    label = "document.getElementById('play').textContent.trim()"  # follows in an event, just after the state itself
    wait(page, f"video.currentTime !== {start} && !video.paused && {label} === 'Pause'")
    assert button.text == "Pause"
    button.click()
    wait(page, f"video.paused && {label} === 'Play'")
    assert button.text == "Play"


def test_frames_can_be_stepped(page):
    page.execute_script("stepTo(0)")
    wait(page, "frameNow() === 0 && !video.seeking")
    page.find_element(By.ID, "forward").click()
    wait(page, "frameNow() === 1 && !video.seeking")
    page.find_element(By.ID, "back").click()
    page.find_element(By.ID, "back").click()
    wait(page, "frameNow() === view.item.frames - 1 && !video.seeking")
    assert page.find_element(By.ID, "count").text == "5/5"


def test_the_divider_moves_and_uncovers_the_other_run(page):
    page.execute_script("setMode('slider'); setSplit(1)")
    left = pixels(page)
    page.execute_script("setSplit(0)")
    right = pixels(page)
    assert np.abs(left - right).mean() > 10  # swapped heads make another picture
    divider = page.find_element(By.ID, "split")
    page.execute_script("setSplit(0.5)")
    for _ in range(3):
        divider.send_keys(Keys.ARROW_LEFT)
    assert float(page.execute_script("return view.split")) < 0.5
    canvas = page.find_element(By.ID, "canvas")
    canvas.send_keys(Keys.ARROW_RIGHT)
    half = pixels(page)
    width = half.shape[1]
    assert np.abs(half[:, : width // 3] - left[:, : width // 3]).max() < 3
    assert np.abs(half[:, -width // 3:] - right[:, -width // 3:]).max() < 3


def test_the_difference_is_white_where_both_are_one_run(page):
    page.find_element(By.CSS_SELECTOR, "button[data-mode=difference]").click()
    assert pixels(page).mean() < 235
    page.execute_script("view.b = view.a")
    assert pixels(page).min() == 255
    page.execute_script("show(view.item.index)")
    wait(page, "video.readyState >= 2")
    page.find_element(By.CSS_SELECTOR, "button[data-mode=beside]").click()
    wide = pixels(page)
    assert wide.shape[1] > 1.2 * wide.shape[0] and page.find_element(By.ID, "tag-b").is_displayed()
    page.execute_script("setMode('slider')")


def column(page, run):
    rows = page.find_elements(By.CSS_SELECTOR, "#prompts tbody tr")
    heads = [h.text.split()[0] for h in page.find_elements(By.CSS_SELECTOR, "#prompts th")]
    return [float(row.find_elements(By.TAG_NAME, "td")[heads.index(run)].text) for row in rows]


def test_columns_sort_both_ways_worst_first(page):
    values = column(page, "swap")
    assert values == sorted(values) and len(values) == 3
    head = lambda: page.find_element(By.CSS_SELECTOR, "#prompts button[data-key='int8+fp16']")
    head().click()
    assert (up := column(page, "int8+fp16")) == sorted(up)
    head().send_keys(Keys.ENTER)
    assert (down := column(page, "int8+fp16")) == sorted(down, reverse=True)
    sorted_by = page.find_elements(By.CSS_SELECTOR, "#prompts th[aria-sort]")
    assert [h.get_attribute("aria-sort") for h in sorted_by] == ["descending"]
    page.find_element(By.ID, "figure").send_keys("SSIM")
    assert all(value <= 1 for value in column(page, "swap"))


def test_a_prompt_opens_its_videos_and_n_goes_on(page):
    page.find_elements(By.CSS_SELECTOR, "#prompts .open")[2].send_keys(Keys.ENTER)
    third = page.find_element(By.ID, "caption").text
    assert third in PROMPTS and len(page.find_elements(By.CSS_SELECTOR, "#prompts tr.chosen")) == 1
    wait(page, "video.readyState >= 2")
    page.find_element(By.ID, "canvas").send_keys("n")
    assert page.find_element(By.ID, "caption").text != third


def test_space_plays_from_the_keyboard(page):
    wait(page, "video.readyState >= 2")
    canvas = page.find_element(By.ID, "canvas")
    canvas.send_keys(" ")
    wait(page, "!video.paused")
    canvas.send_keys(" ")
    wait(page, "video.paused")


def test_everything_can_be_reached_with_tab(page):
    page.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    page.find_element(By.TAG_NAME, "body").click()
    reached = set()
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        reached.add(active.get_attribute("id") or active.get_attribute("data-mode") or active.get_attribute("data-key")
                    or active.tag_name)
    assert {"theme", "slider", "difference", "canvas", "split", "play", "scrub", "run-a", "run-b", "figure", "swap", "heat-run",
            "rect"} <= reached


def test_the_heat_map_speaks_and_follows_its_choices(page):
    before = page.find_element(By.CSS_SELECTOR, "#heat rect").get_attribute("aria-label")
    assert before.startswith("transformer_blocks.0.attn1, step 0: share of the error")
    page.find_element(By.ID, "heat-figure").send_keys("SQNR")
    page.find_element(By.ID, "heat-across").send_keys("heads")
    rects = page.find_elements(By.CSS_SELECTOR, "#heat rect")
    assert len(rects) == 3 * 2 and "head 0: SQNR" in rects[0].get_attribute("aria-label")
    page.execute_script("document.querySelector('#heat rect').focus()")
    page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert "transformer_blocks.1.attn1" in page.find_element(By.ID, "heat-say").text
    assert len(page.find_elements(By.CSS_SELECTOR, "#worst li")) == 6


def test_light_and_dark(page):
    background = lambda: page.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    seen = set()
    for _ in range(2):
        page.find_element(By.ID, "theme").click()
        seen.add(background())
    assert seen == {"rgb(247, 246, 243)", "rgb(18, 20, 23)"}


def test_nothing_went_wrong_meanwhile(page):
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
