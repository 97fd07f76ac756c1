"""The page in a real browser, clicked: chromium, headless, by Selenium."""

import os
import re
import shutil

import numpy as np
import pytest
from report_runs import make_run

from tstar_ray.report import write_experiment_report, write_run_report
from tstar_ray.traces import read_traces

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    variants = "rollout.variants=[{}, {threshold: 0.6}]"
    folder = make_run(tmp_path_factory.mktemp("runs") / "made", settings=[variants])
    write_run_report(folder)
    return folder


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM or not DRIVER:
        told = "no chromium with chromedriver here: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    size, still = "--window-size=1200,1000", "--force-prefers-reduced-motion"  # no animated scrolling
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", size, still):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, folder):
    browser.get((folder / "report.html").as_uri())
    return Page(browser, folder)


class Page:
    """What a person sees and does."""

    def __init__(self, driver, folder):
        self.driver, self.folder = driver, folder

    def find(self, css):
        return self.driver.find_elements("css selector", css)

    def one(self, css):
        (found,) = self.find(css)
        return found

    def click(self, css):
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(css))
        self.one(css).click()

    def show(self):
        """Scroll to the traces; keys act on them only while they are in view."""
        self.driver.execute_script("document.getElementById('traces').scrollIntoView()")

    def press(self, key):
        self.one("body").send_keys(key)

    def select(self, name, index):
        from selenium.webdriver.support.select import Select

        Select(self.one(f"#t-{name}")).select_by_index(index)

    def tokens(self):
        """Classes of every answer token."""
        script = "return [...document.querySelectorAll('.tok:not(.given)')].map(t => [...t.classList])"
        return self.driver.execute_script(script)

    def there(self):
        return [i for i, classes in enumerate(self.tokens()) if "off" not in classes]

    def shown(self):
        """The trajectory the selects point at, from the traces."""
        update = int(self.one("#t-update option:checked").text.split()[0])
        verdict = self.one("#t-sample option:checked").text.split()[-1]
        groups = read_traces(self.folder / "traces" / f"update-{update:05d}.parquet")
        right = int(self.one("#t-problem option:checked").text[0])
        (group,) = [g for g in groups if sum(s.verdict == "correct" for s in g.samples) == right]
        ordered = sorted(group.samples, key=lambda s: s.verdict != "correct")
        same = [s for s in ordered if s.verdict == verdict]
        number = int(self.one("#t-sample option:checked").text.split(":")[0])
        return (same[0] if right == 1 else group.samples[number - 1]).trajectory


def test_it_opens_whole_and_without_any_complaint(page):
    assert page.driver.title == "made · tstar_ray"
    assert page.driver.get_log("browser") == []
    loaded = page.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert len(page.find("figure svg")) == 4
    for figure in page.find("figure svg"):
        assert figure.size["width"] > 300
        assert figure.size["height"] > 100


def test_an_answer_is_stepped_through_by_buttons(page):
    t = page.shown()
    steps = t.step_map
    assert page.there() == list(range(len(steps))), "it opens at the end"
    page.click("#t-first")
    assert page.there() == []
    assert page.one("#t-step").text == f"step 0 of {steps.max()} · 0/{len(steps)}"
    assert not page.one("#t-back").is_enabled()
    for step in range(1, min(6, steps.max())):
        page.click("#t-next")
        assert page.there() == np.flatnonzero(steps <= step).tolist()
        new = [i for i, classes in enumerate(page.tokens()) if "new" in classes]
        assert new == np.flatnonzero(steps == step).tolist()
    page.click("#t-back")
    assert page.there() == np.flatnonzero(steps <= step - 1).tolist()
    page.click("#t-last")
    assert page.one("#t-step").text == f"step {steps.max()} of {steps.max()} · {len(steps)}/{len(steps)}"
    assert not page.one("#t-next").is_enabled()


def test_an_answer_is_stepped_through_by_keys_and_slider(page):
    from selenium.webdriver.common.keys import Keys

    steps = page.shown().step_map
    page.show()
    page.press(Keys.HOME)
    assert page.there() == []
    page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_RIGHT)
    assert page.there() == np.flatnonzero(steps <= 2).tolist()
    page.press(Keys.ARROW_LEFT)
    assert page.there() == np.flatnonzero(steps <= 1).tolist()
    page.press(Keys.END)
    assert page.there() == list(range(len(steps)))
    page.one("#t-slider").send_keys(Keys.ARROW_LEFT)
    assert page.there() == np.flatnonzero(steps < steps.max()).tolist()


def test_it_plays_to_the_end(page):
    from selenium.webdriver.support.wait import WebDriverWait

    steps = page.shown().step_map
    page.click("#t-play")
    assert page.one("#t-play").text == "Pause"
    WebDriverWait(page.driver, 60).until(lambda _: page.one("#t-play").text == "Play")
    assert page.there() == list(range(len(steps)))


def test_blocks_have_borders_and_what_follows_the_stop_is_faded(page):
    t = page.shown()
    blocks = page.find("#t-answer .block")
    assert len(blocks) == t.blocks
    assert [len(b.find_elements("css selector", ".tok")) for b in blocks] == [t.block_size] * t.blocks
    assert len(page.find(".tok.given")) == t.prompt_len % t.block_size
    after = [i for i, classes in enumerate(page.tokens()) if "after" in classes]
    assert after == list(range(t.completion_len, len(t.step_map)))
    assert {b.value_of_css_property("border-top-style") for b in blocks} == {"solid"}


def test_confidence_is_the_bar_and_the_tooltip(page):
    t = page.shown()
    widths = page.driver.execute_script("return [...document.querySelectorAll('.tok .bar')].map(b => b.style.width)")
    np.testing.assert_allclose([float(w[:-1]) / 100 for w in widths], np.exp(t.logprobs), atol=6e-4)
    titles = [e.get_attribute("title") for e in page.find(".tok:not(.given)")]
    assert [int(re.match(r"step (\d+)", title)[1]) for title in titles] == t.step_map.tolist()


def test_colours_follow_what_is_asked(page):
    """The same colour for the same step in its block, another for another, and by probability something else."""

    def colours():
        return page.driver.execute_script(
            "return [...document.querySelectorAll('.tok:not(.given)')].map(t => t.style.background)"
        )

    t = page.shown()
    block = (t.prompt_len + np.arange(len(t.step_map))) // t.block_size
    by_block = colours()
    for k in set(block):
        own = np.flatnonzero(block == k)
        pairs = {(int(t.step_map[i]), by_block[i]) for i in own}
        assert len(pairs) == len(set(t.step_map[own])) == len({colour for _, colour in pairs})
    page.click("[data-colour=all]")
    overall = dict(zip(t.step_map.tolist(), colours()))
    assert len(set(overall.values())) == t.step_map.max()
    page.click("[data-colour=p]")
    assert colours() != by_block
    assert page.one("[data-colour=p]").get_attribute("aria-pressed") == "true"
    assert page.one("[data-colour=block]").get_attribute("aria-pressed") == "false"


def test_update_problem_and_sample_are_chosen(page):
    assert [o.text for o in page.find("#t-update option")] == [f"{i} · b{4 if i < 5 else 8}" for i in range(1, 9)]
    seen = set()
    for update, problem, sample in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (6, 0, 1), (7, 2, 0)):
        page.select("update", update)
        page.select("problem", problem)
        page.select("sample", sample)
        t = page.shown()
        assert page.one("#t-step").text.startswith(f"step {t.step_map.max()} of {t.step_map.max()}")
        info = page.one("#t-info").text
        assert f"B={t.block_size} · {t.completion_len} tokens in {t.step_map.max()} steps" in info
        assert f"decoded {('as the stage says', 'threshold 0.6')[t.sample]}" in info
        seen.add(page.one("#t-answer").text)
    assert len(seen) == 5
    page.show()
    page.press("[")
    assert page.one("#t-update option:checked").text.startswith("7 ")


def test_light_and_dark(page):
    def ground():
        return page.one("body").value_of_css_property("background-color")

    before = ground()
    page.click("#theme")
    assert ground() != before
    line = page.one("g[id='curves-text_1'] text")
    inks = [line.value_of_css_property("fill")]
    page.click("#theme")
    assert ground() == before
    inks.append(line.value_of_css_property("fill"))
    assert inks[0] != inks[1], "figures change with the page"


def test_the_page_of_an_experiment_stands_alone_and_leads_to_its_runs(browser, folder):
    write_experiment_report({"one": [folder]}, folder.parent)
    browser.get((folder.parent / "report.html").as_uri())
    page = Page(browser, folder)
    assert all(figure.is_displayed() for figure in page.find("#result svg, #curves svg, #schedule svg"))
    assert len(page.find("#schedule svg")) == 1
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    page.click("#runs a")
    assert page.one("h1").text == folder.name
