"""The page in a real browser: log in, watch a round finish, see a failed site, on a desk and on a phone.

Screenshots go to the folder in PAGE_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import Page, chromium, find_chromium
from fake_federation import RUN, in_threads, make_registration, make_settings, make_weights, served, wait_until
from patience import PATIENCE_S
from prefix_proxy import prefixed

from nnunetv2.federated.coordinator.http.endpoint import Place
from nnunetv2.federated.protocol import messages
from nnunetv2.federated.protocol.keys import InitialKey, RegistrationKey, RoundKey, ValidationKey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None, reason="there is no Chromium on this machine: apt-get install chromium"
    ),
]
LABELS = {"background": 0, "pancreas": 1, "tumour": 2}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def make_page(browser):
    pages = []

    def make(width=1280, **look) -> Page:
        pages.append(Page(browser))
        pages[-1].look_like(width, **look)
        return pages[-1]

    yield make
    for page in pages:
        assert page.complaints() == []


@pytest.fixture
def federation(tmp_path):
    """Two of three sites have trained three rounds; the third is invited only."""
    settings = make_settings(sites=("A", "B"), num_epochs=5, quorum=1, deadline_s=3600)
    with (
        served(tmp_path / "federation", settings) as federation,
        federation.client("A") as a,
        federation.client("B") as b,
    ):
        in_threads(
            lambda: a.exchange(RegistrationKey(RUN), make_registration(1, labels=LABELS)),
            lambda: b.exchange(RegistrationKey(RUN), make_registration(2, labels=LABELS)),
        )
        in_threads(
            lambda: a.exchange(InitialKey(RUN), messages.Update()),
            lambda: b.exchange(InitialKey(RUN), messages.Update(), make_weights(0)),
        )
        federation.a, federation.b = a, b
        for number in range(3):
            play_round(federation, number)
        yield federation


def update(number: int, seed: int) -> messages.Update:
    """Return what a site sends: its training loss, and the validation of the round before."""
    earlier = (
        None
        if number == 0
        else messages.EarlierMetrics(
            round=number - 1,
            metrics={
                "val_losses": 0.6 / number,
                "mean_fg_dice": 0.2 * (number - 1) + 0.05 * seed,
                "dice_per_class_or_region": [0.1, 0.2],
            },
        )
    )
    return messages.Update(metrics={"train_losses": 0.5 / (number + 1) - 0.1 * seed}, earlier=earlier)


def play_round(federation, number: int) -> None:
    clients = {1: federation.a, 2: federation.b}
    in_threads(
        *(
            lambda seed=seed, client=client: client.exchange(
                RoundKey(RUN, number), update(number, seed), make_weights(seed)
            )
            for seed, client in clients.items()
        )
    )
    found = messages.Validation(tp=[10.0 + number, 5.0], fp=[5.0, 5.0], fn=[5.0, 5.0])
    for client in clients.values():
        client.contribute(ValidationKey(RUN, number), found)
    wait_until(lambda: federation.coordinator.book.is_closed(ValidationKey(RUN, number)))


def invitation(federation, url: str | None = None, name: str = "eve") -> str:
    return Place(url or federation.url).invitation(
        "test", name, federation.coordinator.invite(name, "observer", by="boss")
    )


def log_in(federation, page: Page, url: str | None = None, name: str = "eve") -> str:
    """Open the link of an invitation, join, and return the token."""
    page.open(f"{url or federation.url}/#{invitation(federation, url, name)}")
    page.wait_for("document.getElementById('enrol-form').offsetHeight > 0")
    token = page.run("document.getElementById('new-token').value")
    page.click("#enrol-form button[type=submit]")
    page.wait_for("document.getElementById('view').offsetHeight > 0")
    return token


def picture(page: Page, name: str) -> None:
    if "PAGE_SCREENSHOTS" in os.environ:
        folder = Path(os.environ["PAGE_SCREENSHOTS"])
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(folder / f"{name}.png")


def shows(page: Page, *words: str) -> None:
    """Wait until the page shows all of this."""
    for word in words:
        page.wait_for(f"(document.body?.innerText ?? '').replaceAll('\\u00a0', ' ').includes({word!r})")


# ------------------------------------------------------------------------------------------------------------ login
def test_an_invitation_is_opened_and_the_token_is_the_way_in_later(federation, make_page):
    page = make_page()
    token = log_in(federation, page)
    assert token.startswith("eve.") and len(token) > 40
    shows(page, "eve, observer", "3 of 5", "Round 3:")
    assert page.run("location.href") == f"{federation.url}/", "the secret does not stay in the address"
    assert page.run("document.getElementById('new-token').value + document.cookie + localStorage.length") == "0"
    picture(page, "desktop_light")

    page.click("#logout")
    shows(page, "You have logged out.")
    assert page.run("document.getElementById('view').offsetHeight") == 0
    page.type("#secret", token)
    page.press("Enter")
    shows(page, "eve, observer", "3 of 5")
    page.call("Page.reload")
    shows(page, "eve, observer")
    assert {urlsplit(url).netloc for url in page.requests() if not url.startswith("data:")} == {
        urlsplit(federation.url).netloc
    }


def test_a_wrong_token_is_refused_in_words(federation, make_page):
    page = make_page(420)
    page.open(f"{federation.url}/")
    page.wait_for("document.activeElement.id === 'secret'")
    page.type("#secret", "not a token")
    page.press("Enter")
    shows(page, "A token is a name, a dot and many letters")
    picture(page, "login")
    page.run("document.getElementById('secret').value = ''")
    page.type("#secret", f"eve.{secrets.token_urlsafe(32)}")
    page.press("Enter")
    shows(page, "The coordinator does not know this credential")
    assert all("401" in complaint for complaint in page.complaints())
    page.browser.events.clear()  # the 401 was meant


def test_a_revoked_observer_is_shown_the_door(federation, make_page):
    page = make_page()
    log_in(federation, page)
    shows(page, "Round 3:")
    federation.coordinator.revoke("eve", by="boss")
    shows(page, "Your session has ended.")
    assert page.run("document.getElementById('view').offsetHeight") == 0
    page.browser.events.clear()


# -------------------------------------------------------------------------------------------------------------- live
def test_a_round_finishes_before_the_eyes_of_the_viewer(federation, make_page):
    page = make_page()
    log_in(federation, page)
    page.wait_for("document.querySelectorAll('.chart').length === 4")
    shows(page, "Round 3: waiting for A, B", "3 of 5", "Dice of aggregate 2")
    points, validated = (
        f"document.querySelectorAll('.chart')[{place}].querySelector('path.pooled').getAttribute('d')"
        ".split(/[ML]/).length - 1"
        for place in (0, 1)
    )
    assert (page.run(points), page.run(validated)) == (3, 2)  # what the last round's weights score comes with the next
    page.run("window.stayed = true")

    waiting = threading.Thread(target=lambda: federation.a.exchange(RoundKey(RUN, 3), update(3, 1), make_weights(1)))
    waiting.start()
    shows(page, "Round 3: waiting for B", "has sent, waits")
    federation.b.exchange(RoundKey(RUN, 3), update(3, 2), make_weights(2))
    waiting.join(PATIENCE_S)
    shows(page, "4 of 5", "Round 4: waiting for A, B")
    page.wait_for(f"{points} === 4 && {validated} === 3")
    play_round(federation, 4)
    shows(page, "5 of 5", "complete", "Model written to", "Dice of aggregate 4")
    page.wait_for(f"{points} === 5 && {validated} === 4")
    assert page.run("window.stayed"), "without loading the page again"
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    shows(page, "pancreas", "tumour")
    picture(page, "complete")


def test_a_failed_site_is_seen_with_its_reason(federation, make_page):
    page = make_page(dark=True)
    log_in(federation, page)
    shows(page, "Round 3:", "errors in the last 24 h")
    federation.b.report_failure(RUN, 3, "CUDA out of memory: tried to allocate 2.50 GiB <b>bold</b>")
    shows(page, "site has failed")
    assert "CUDA out of memory: tried to allocate 2.50 GiB <b>bold</b>" in page.text("#troubles"), "text, not markup"
    assert page.run("document.querySelectorAll('.members .bad-badge').length") == 1
    assert "failed" in page.text("#sites")
    picture(page, "desktop_dark_failed")


def test_the_page_says_so_when_the_coordinator_is_gone_and_comes_back(federation, make_page):
    page = make_page()
    log_in(federation, page)
    shows(page, "live")
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    shows(page, "no connection, trying again", "this is how things were at")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait_for("document.getElementById('live').innerText === 'live'")
    assert page.run("document.getElementById('stale').offsetHeight") == 0
    page.browser.events.clear()


# ------------------------------------------------------------------------------------------------- looks and access
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_everything_without_sideways_scrolling(federation, make_page, dark):
    federation.coordinator.invite("hospital-with-a-name_that-no-phone-can-show-on-a-single-line_64", "site", by="boss")
    federation.b.report_failure(RUN, 3, "no space left on device: " + "/very/long/path" * 20)
    page = make_page(390, height=844, phone=True, dark=dark)
    log_in(federation, page)
    page.wait_for("document.querySelectorAll('.chart').length === 4")
    page.run("document.querySelectorAll('details').forEach(one => { one.open = true })")
    shows(page, "no space left on device")
    assert page.run("document.documentElement.scrollWidth") == 390
    too_wide = page.run("""[...document.querySelectorAll('body *')].filter(one =>
        !one.closest('.scroll, .chart svg, thead') && one.getBoundingClientRect().right > 390.5)
        .map(one => one.outerHTML.slice(0, 80))""")
    assert too_wide == []
    picture(page, f"phone_{'dark' if dark else 'light'}")


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(federation, make_page, dark):
    federation.b.report_failure(RUN, 3, "out of memory")
    page = make_page(dark=dark)
    log_in(federation, page)
    shows(page, "out of memory", "Dice of the aggregate")
    assert page.run(CONTRAST) == []


def test_charts_are_read_with_the_keyboard_and_lines_are_chosen(federation, make_page):
    page = make_page()
    log_in(federation, page)
    page.wait_for("document.querySelectorAll('.chart').length === 4")
    assert "all sites: " in page.run("document.querySelector('.chart svg').getAttribute('aria-label')")
    page.run("document.querySelector('.chart svg').focus()")
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    assert page.text(".chart .tip").startswith("Round 1") and "all sites" in page.text(".chart .tip")
    page.press("Escape")
    assert page.run("document.querySelector('.chart .tip').offsetHeight") == 0
    page.click(".legend button")
    assert page.run("document.querySelectorAll('.chart:first-child g.dim').length") == 2
    assert page.run("document.querySelector('.legend button').getAttribute('aria-pressed')") == "true"


def test_landmarks_labels_and_headings_are_there(federation, make_page):
    page = make_page()
    log_in(federation, page)
    shows(page, "Round 3:")
    assert page.run("document.documentElement.lang") == "en"
    assert page.run("['header', 'main', 'footer', 'h1'].every(one => document.querySelectorAll(one).length === 1)")
    assert page.run("""[...document.querySelectorAll('input')].every(one => one.labels.length === 1)
        && [...document.querySelectorAll('button')].every(one => one.innerText.trim() || one.offsetHeight === 0)""")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in nodes if not node.get("ignored")}
    assert {"main", "banner", "contentinfo", "heading", "table", "progressbar", "status"} <= roles


def test_the_page_works_under_the_prefix_of_a_proxy(federation, make_page):
    with prefixed(federation.url, "/fed/nnunet") as url:
        page = make_page()
        log_in(federation, page, url, "adam")
        shows(page, "adam, observer", "3 of 5")
        page.call("Page.reload")
        shows(page, "adam, observer", "Round 3:")
        page.call("Page.navigate", url="about:blank")  # before the proxy is gone
        page.wait_for("location.href === 'about:blank'")


CONTRAST = """(() => {  // WCAG 2: at least 4.5 to 1, of all text that is shown
    const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const colour = (text) => text.match(/[0-9.]+/g).map(Number);
    const ground = (node) => {
        for (; node; node = node.parentElement) {
            const found = colour(getComputedStyle(node).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
        }
        return [255, 255, 255];
    };
    return [...document.querySelectorAll('body *')].filter((one) => one.offsetHeight > 0 && !one.closest('.skip')
        && [...one.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim())).map((one) => {
            const [a, b] = [light(colour(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
            return [one.outerHTML.slice(0, 90), (a + 0.05) / (b + 0.05)];
        }).filter(([, ratio]) => ratio < 4.5);
})()"""
