"""The page at / in a headless Chromium, as a desktop, a phone and a keyboard see it."""

from __future__ import annotations

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import Server, serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync")
WIDTHS = {"phone": (360, 740), "desktop": (1280, 860)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield started
        started.close()


@pytest.fixture(params=WIDTHS)
def page(browser: playwright.Browser, server: Server, request: pytest.FixtureRequest) -> Iterator[playwright.Page]:
    """The loaded page; fails when it logs an error or talks to another host."""
    yield from open_page(browser, server, request.param)


def open_page(browser: playwright.Browser, server: Server, device: str, before: str = "") -> Iterator[playwright.Page]:
    """before: a script that runs before the page's own."""
    width, height = WIDTHS[device]
    context = browser.new_context(viewport={"width": width, "height": height})
    context.set_default_timeout(30_000)
    opened = context.new_page()
    opened.add_init_script(before)
    troubles: list[str] = []
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("console", lambda said: "Content Security" in said.text and troubles.append(said.text))
    ours = (server.url, "data:", "blob:")
    opened.on("request", lambda sent: sent.url.startswith(ours) or troubles.append(sent.url))
    opened.goto(server.url)
    opened.wait_for_selector(".examples button")
    yield opened
    assert not troubles
    context.close()


def seeds_shown(page: playwright.Page) -> list[str]:
    return re.findall(r"seed (\d+)", " ".join(page.locator("figcaption").all_text_contents()))


def test_page_is_one_file_without_foreign_hosts(server: Server) -> None:
    answer = server.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.findall(r"<[^>]+\s(?:style|on\w+)=", answer.text), "the policy would not let them through"
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", answer.text)


def test_nothing_sticks_out_sideways(page: playwright.Page) -> None:
    page.click("#compare")
    page.wait_for_selector("figure:nth-child(4) img")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_click_on_an_example_draws_it(page: playwright.Page) -> None:
    page.click(".examples button")
    page.wait_for_selector("figure img")
    assert page.input_value("#prompt") == "a small red metal sphere"
    width, natural = page.evaluate(
        "(() => { const i = document.querySelector('figure img'); return [i.width, i.naturalWidth] })()"
    )
    assert natural == 64
    assert width >= 4 * natural
    assert width % natural == 0
    assert page.evaluate("getComputedStyle(document.querySelector('figure img')).imageRendering") == "pixelated"
    assert page.locator("#stages li").count() == 5
    assert "ms on the server" in page.inner_text("#total")


def test_locked_seed_repeats_the_picture_and_an_open_one_is_drawn_anew(page: playwright.Page) -> None:
    sources = []
    for press in ("#go", "#lock", "#lock"):
        if press == "#lock":
            page.click("#lock")
        page.evaluate("document.getElementById('grid').replaceChildren()")
        page.click("#go")
        page.wait_for_selector("figure img")
        sources.append((seeds_shown(page)[0], page.get_attribute("figure img", "src")))
    assert sources[0] == sources[1]
    assert sources[2] != sources[1]


def test_keyboard_alone_is_enough(page: playwright.Page) -> None:
    page.focus("#prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("a green cube")
    page.keyboard.press("Enter")
    page.wait_for_selector("figure img")
    assert page.get_attribute("figure img", "alt").startswith("a green cube (seed ")
    page.evaluate("document.getElementById('grid').replaceChildren()")
    page.focus("input[name=steps]:checked")
    page.keyboard.press("ArrowRight")
    page.focus("#go")
    page.keyboard.press("Space")
    page.wait_for_selector("figure img")
    assert "8 steps" in page.inner_text("figcaption")


def test_the_curl_command_makes_the_shown_picture(page: playwright.Page) -> None:
    page.fill("#prompt", 'it\'s a "red" cube $HOME \\ `x`')
    page.click("#go")
    page.wait_for_selector("figure img")
    words = shlex.split(page.inner_text("#curl").replace("\\\n", " "))
    assert words[0] == "curl"
    url, body = next(w for w in words if w.startswith("http")), json.loads(words[words.index("-d") + 1])
    answer = httpx.post(url, json=body).json()
    shown = page.get_attribute("figure img", "src")
    assert shown == f"data:image/png;base64,{answer['data'][0]['b64_json']}"
    if curl := shutil.which("curl"):
        output = subprocess.run([curl, *words[1:]], capture_output=True, check=True).stdout
        assert json.loads(output)["data"] == answer["data"]


def test_copy_button_copies_the_command(page: playwright.Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.wait_for_selector("#copy:has-text('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text("#curl")


def test_errors_are_shown(page: playwright.Page) -> None:
    page.fill("#prompt", "   ")
    page.click("#go")
    assert "Describe a picture first" in page.inner_text("#error")
    page.fill("#prompt", "a red cube")
    page.fill("#seed", "seven")
    page.click("#go")
    assert page.inner_text("#error") == "The seed is seven; give a whole number up to 9007199254740991."
    assert page.evaluate("document.activeElement.id") == "seed"
    page.fill("#seed", "7")
    page.route("**/v1/images/generations", lambda route: route.abort())
    page.click("#go")
    page.wait_for_selector("#error:has-text('does not answer')")
    page.unroute("**/v1/images/generations")
    page.click("#go")
    page.wait_for_selector("figure img")
    assert page.locator("#error").is_hidden()


def test_truncated_prompts_are_told(page: playwright.Page) -> None:
    page.fill("#prompt", "red " * 40)
    page.click("#go")
    page.wait_for_selector("#note:has-text('Prompt was truncated')")


def test_the_picture_is_shown_large(page: playwright.Page) -> None:
    """A picture must take up a good part of the screen: not an empty frame, not a stamp."""
    page.click("#go")
    page.wait_for_selector("figure img")
    box = page.locator("figure img").bounding_box()
    viewport = page.viewport_size
    assert box is not None
    assert viewport is not None
    assert box["width"] >= 0.35 * viewport["width"]


def test_the_python_program_makes_the_shown_picture(page: playwright.Page, tmp_path: Path) -> None:
    page.fill("#prompt", 'it\'s a "red" cube \\ {x}: 1, 2')
    page.click("#go")
    page.wait_for_selector("figure img")
    page.click("#as-python")
    assert page.locator("#curl").is_hidden()
    program = page.inner_text("#python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    shown = page.get_attribute("figure img", "src").partition(",")[2]
    assert (tmp_path / "picture.png").read_bytes() == base64.b64decode(shown)


def test_pixels_change_while_it_denoises(page: playwright.Page) -> None:
    page.evaluate(
        "() => { const shown = watch; window.seen = new Set();"
        " window.watch = (event, body) => { shown(event, body);"
        " if (event?.type === 'image_generation.partial_image') seen.add(document.getElementById('preview').src) } }"
    )
    page.click("label:has(input[name=steps][value='8'])")
    page.click("#go")
    page.wait_for_selector("figure img")
    assert page.evaluate("window.seen.size") == 3
    assert page.locator("#live").is_hidden()


def test_the_place_in_the_queue_is_shown_and_stop_gives_up(page: playwright.Page) -> None:
    told = {"type": "image_generation.progress", "steps_done": 0, "percent": 0, "position": 3, "eta_ms": 2500}
    page.evaluate("event => watch(event, {steps: 4})", told)
    assert page.inner_text("#going") == "3 pictures before yours, about 2.5 s to go"
    page.evaluate("event => watch(event, {steps: 4})", {**told, "position": 0, "steps_done": 2, "eta_ms": 40})
    assert page.inner_text("#going") == "Step 3 of 4, less than a second to go"
    page.evaluate("watch(null)")
    page.route("**/v1/images/generations", lambda route: None)
    page.click("#go")
    page.wait_for_selector("#stop")
    assert page.get_attribute("#frame", "aria-busy") == "true"
    page.keyboard.press("Escape")
    page.wait_for_selector("#note:has-text('Stopped')")
    assert page.locator("#error").is_hidden()
    assert page.locator("#stop").is_hidden()
    page.click("#go")
    page.focus("#stop")
    page.keyboard.press("Space")
    page.wait_for_selector("#note:has-text('Stopped')")
    assert page.evaluate("document.activeElement.id") == "go", "the keyboard does not lose its place with the button"
    page.unroute("**/v1/images/generations")
    page.click("#go")
    page.wait_for_selector("figure img")


def test_how_long_several_pictures_take_is_told_beforehand(page: playwright.Page) -> None:
    page.route("**/v1/images/generations", lambda route: None)
    page.click("label:has(input[name=count][value='4'])")
    page.click("#go")
    page.wait_for_selector("#going:has-text('4 pictures, ')")
    assert page.inner_text("#going").endswith(" to go")
    page.keyboard.press("Escape")
    page.wait_for_selector("#note:has-text('Stopped')")


def test_compared_pictures_stay_in_sight_while_the_next_one_is_made(page: playwright.Page) -> None:
    page.evaluate(
        "() => { const shown = watch; window.told = []; window.watch = (event, body) => { shown(event, body);"
        " if (event) told.push([document.getElementById('going').textContent,"
        " [...document.querySelectorAll('figure img')].filter(i => i.offsetWidth).length]) } }"
    )
    page.click("#compare")
    page.wait_for_selector("figure:nth-child(4) img")
    page.wait_for_selector("#stop", state="hidden")
    captions = page.locator("figcaption").all_text_contents()
    assert [caption.partition(" · ")[0] for caption in captions] == ["1 step", "2 steps", "4 steps", "8 steps"]
    last = [shown for text, shown in page.evaluate("told") if text.startswith("4 of 4 · Step")]
    assert last and set(last) == {3}


def stored(page: playwright.Page, count: int) -> None:
    """Wait until the browser has written what the page shows already."""
    page.wait_for_function(f"shelf().then(store => ended(store.count())).then(count => count === {count})")


def test_earlier_pictures_stay_in_the_browser_until_they_are_deleted(page: playwright.Page) -> None:
    for prompt in ("a red cube", "a green sphere"):
        page.fill("#prompt", prompt)
        page.focus("#prompt")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"figure img[alt^='{prompt}']")
    source = page.get_attribute("figure img", "src")
    page.reload()
    playwright.expect(page.locator("#past li")).to_have_count(2)
    assert page.inner_text("#kept") == "kept in this browser"
    page.locator("#past li button").first.press("Enter")
    assert page.get_attribute("figure img", "src") == source and page.input_value("#prompt") == "a green sphere"
    page.keyboard.press("Delete")
    playwright.expect(page.locator("#past li")).to_have_count(1)
    page.reload()
    playwright.expect(page.locator("#past img")).to_have_attribute("alt", re.compile("^a red cube, seed"))
    page.click("#clear")
    playwright.expect(page.locator("#history")).to_be_hidden()
    page.reload()
    page.wait_for_selector(".examples button")
    playwright.expect(page.locator("#past li")).to_have_count(0)
    assert page.locator("#history").is_hidden()


CLEAR_AND_RELOAD = """
leaving = true;
new MutationObserver(() => $("history").hidden && location.reload())
  .observe($("history"), {attributes: true});
$("clear").click();
"""


@pytest.mark.parametrize("leave", [CLEAR_AND_RELOAD, "leaving = true; $('clear').click(); location.reload()"])
def test_a_cleared_history_does_not_come_back_with_a_reload_at_once(
    browser: playwright.Browser, server: Server, leave: str
) -> None:
    """In the moment in which the page says that it is cleared, and in that of the click."""
    several = (
        "for (let i = 0; i < 8; i++) remember({body: {}, pictures: [{source: 'data:,' + 'x'.repeat(1e6), seed: i}]})"
    )
    for opened in open_page(browser, server, "desktop"):
        for _ in range(3):
            opened.evaluate(several)
            stored(opened, 8)
            opened.reload()
            playwright.expect(opened.locator("#past li")).to_have_count(8)
            opened.evaluate(leave)
            opened.wait_for_function("typeof leaving === 'undefined'")
            assert opened.evaluate("shelf().then(store => ended(store.count()))") == 0


def test_the_history_is_bounded_in_number_and_length(page: playwright.Page) -> None:
    """The newest picture stays whatever its length; of the others as many as fit."""
    result = "{body: {prompt: 'x', seed: 1, steps: 1}, pictures: [{source: 'data:,' + 'x'.repeat(LENGTH), seed: 1}]}"
    many = page.evaluate(
        "() => { for (let i = 0; i < 40; i++) remember(" + result.replace("LENGTH", "9") + "); return past.length }"
    )
    assert many == page.evaluate("KEPT")
    page.evaluate("remember(" + result.replace("LENGTH", "KEPT_CHARS") + ")")
    assert page.evaluate("past.length") == 1
    stored(page, 1)
    page.reload()
    playwright.expect(page.locator("#past li")).to_have_count(1)


def test_a_browser_that_keeps_nothing_says_so(browser: playwright.Browser, server: Server) -> None:
    for opened in open_page(browser, server, "desktop", "indexedDB.open = () => { throw Error('private') }"):
        opened.click("#go")
        opened.wait_for_selector("figure img")
        playwright.expect(opened.locator("#past li")).to_have_count(1)
        assert opened.inner_text("#kept") == "until this page is closed"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser: playwright.Browser, server: Server, scheme: str) -> None:
    """WCAG 2's contrast of at least 4.5 for every text that is shown."""
    for opened in open_page(browser, server, "desktop"):
        opened.emulate_media(color_scheme=scheme)
        opened.click("#go")
        opened.wait_for_selector("figure img")
        opened.wait_for_selector("#stop", state="hidden")
        opened.evaluate("say('error', 'wrong'); say('note', 'told')")
        assert opened.evaluate(FAINT) == []


def test_everything_that_takes_input_has_a_name(page: playwright.Page) -> None:
    page.click("#go")
    page.wait_for_selector("#past li")
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea, progress, pre, img, a')].filter(e =>"
        " e.offsetParent && !(e.ariaLabel || e.alt || e.labels?.length || e.textContent.trim()"
        " || e.querySelector('img[alt]')))"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []


FAINT = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
  return [...document.querySelectorAll('body *')].filter(e => e.offsetParent
      && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
    .map(e => {
      const both = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(ground(e))];
      const [a, b] = both.sort((x, y) => y - x);
      return [e.textContent.trim(), (a + .05) / (b + .05)]; })
    .filter(([, contrast]) => contrast < 4.5);
}"""


def test_models_are_compared_where_there_are_several(
    browser: playwright.Browser, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Such as a teacher beside its student: here the same weights under another name, which lack one step."""
    shutil.copytree(tiny_bundle, tmp_path / "bundles" / "tiny-sdxl")
    shutil.copytree(tiny_bundle, tmp_path / "bundles" / "tiny-teacher")
    manifest = tmp_path / "bundles" / "tiny-teacher" / "bundle.json"
    told = json.loads(manifest.read_text()) | {"name": "tiny-teacher"}
    told["samplers"].pop("1")
    manifest.write_text(json.dumps(told))
    with serve(tmp_path / "bundles", tmp_path / "home") as running:
        for opened in open_page(browser, running, "phone"):
            opened.click("label:has(input[name=steps][value='1'])")
            opened.click("#rival")
            opened.wait_for_selector("figure:nth-child(2) img")
            captions = opened.locator("figcaption").all_text_contents()
            assert captions[0].startswith("tiny-sdxl · 1 step · ")
            assert captions[1].startswith(f"tiny-teacher · {told['default_steps']} steps · ")
            seeds = [re.findall(r"seed (\d+)", alt)[0] for alt in opened.eval_on_selector_all("figure img", ALTS)]
            assert seeds[0] == seeds[1]
            assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")


ALTS = "images => images.map(image => image.alt)"


# --- videos ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def video_page(
    browser: playwright.Browser, video_server: Server, request: pytest.FixtureRequest
) -> Iterator[playwright.Page]:
    """The loaded page with the model of videos chosen."""
    for opened in open_page(browser, video_server, getattr(request, "param", "phone")):
        opened.select_option("#model", "tiny-wan")
        yield opened


@pytest.mark.parametrize("video_page", WIDTHS, indirect=True)
def test_a_video_is_filmed_shown_and_listed(video_page: playwright.Page) -> None:
    assert video_page.inner_text("#asked") == "Describe a video"
    assert video_page.locator("#frames input").count() == 3 and video_page.locator("#countbox").is_hidden()
    video_page.fill("#prompt", "a red sphere rolling")
    video_page.evaluate(
        "() => { const shown = watch; window.seen = new Set();"
        " window.watch = (event, body) => { shown(event, body); if (body?.picture) seen.add(body.picture) } }"
    )
    video_page.focus("#prompt")
    video_page.keyboard.press("Enter")
    video_page.wait_for_selector("figure video")
    assert video_page.evaluate("document.querySelector('figure video').getAttribute('aria-label')").startswith(
        "a red sphere rolling (seed "
    )
    while video_page.evaluate("document.querySelector('figure video').readyState") < 2:
        video_page.wait_for_timeout(50)
    width, height = video_page.evaluate(
        "(() => { const v = document.querySelector('figure video'); return [v.clientWidth, v.clientHeight] })()"
    )
    assert width == height >= 4 * 32, "square as its 32 pixels are, and not a stamp"
    assert video_page.evaluate("document.querySelector('figure video').videoWidth") == 32
    assert "ms on the server" in video_page.inner_text("#total")
    assert video_page.evaluate("window.seen.size") > 0, "previews come while it is denoised"
    first = video_page.locator("#jobs li").first
    assert "a red sphere rolling" in first.inner_text() and "5 frames" in first.inner_text()
    first.locator("img").wait_for()
    assert video_page.locator("#stages li").count() == 5
    assert video_page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    video_page.reload()
    video_page.select_option("#model", "tiny-wan")
    video_page.wait_for_selector("#jobs li")
    with video_page.expect_download() as download:
        video_page.locator("#jobs li").first.get_by_role("button", name="Save").press("Enter")
    assert Path(download.value.path()).read_bytes()[4:8] == b"ftyp"
    count = video_page.locator("#jobs li").count()
    video_page.locator("#jobs li").first.get_by_role("button", name="Delete").press("Space")
    playwright.expect(video_page.locator("#jobs li")).to_have_count(count - 1)


def test_stop_and_escape_cancel_a_video(video_page: playwright.Page, video_server: Server) -> None:
    """The page hears nothing of the job, so that it cannot be done before it is stopped."""
    video_page.route("**/events", lambda route: None)
    video_page.click("#frames label:last-child")
    video_page.click("#go")
    video_page.wait_for_selector("#jobs li progress")
    cancelled: list[str] = []
    video_page.on("request", lambda sent: cancelled.append(sent.url) if sent.url.endswith("/cancel") else None)
    video_page.keyboard.press("Escape")
    video_page.wait_for_selector("#jobs li progress", state="detached")
    assert len(cancelled) == 1
    state = httpx.get(cancelled[0].removesuffix("/cancel")).json()["status"]
    assert state in ("failed", "completed"), "it may have been done before the stop came"
    video_page.unroute("**/events")


def test_the_commands_for_a_video_make_it(video_page: playwright.Page, tmp_path: Path) -> None:
    video_page.fill("#prompt", 'it\'s a "red" cube')
    words = shlex.split(video_page.inner_text("#curl").replace("\\\n", " "))
    url, body = next(w for w in words if w.startswith("http")), json.loads(words[words.index("-d") + 1])
    assert httpx.post(url, json=body, timeout=60).content[4:8] == b"ftyp"
    video_page.click("#as-python")
    program = "import warnings; warnings.simplefilter('ignore')\n" + video_page.inner_text("#python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "clip.mp4").read_bytes()[4:8] == b"ftyp"


def test_pictures_are_drawn_beside_videos(video_page: playwright.Page) -> None:
    video_page.select_option("#model", "tiny-sdxl")
    assert video_page.locator("#videos").is_hidden() and video_page.locator("#framesbox").is_hidden()
    video_page.click("#go")
    video_page.wait_for_selector("figure img")


def test_videos_are_compared_side_by_side(video_page: playwright.Page) -> None:
    video_page.click("#compare")
    count = video_page.evaluate("stepsCompared().length")
    video_page.wait_for_selector(f"figure:nth-child({count}) video")
    video_page.wait_for_selector("#stop", state="hidden")
    captions = video_page.locator("figcaption").all_text_contents()
    assert len(captions) == count >= 2
    assert len({re.findall(r"seed (\d+)", caption)[0] for caption in captions}) == 1
    assert len({re.findall(r"(\d+) step", caption)[0] for caption in captions}) == count
    assert video_page.evaluate("document.documentElement.scrollWidth <= innerWidth")
