"""The live view in a real browser: what people see, and can do by mouse, by keys alone, in the dark, on a phone."""

import os
import random
import re
from pathlib import Path

import pytest

# Where `make pictures` puts what the pages of the documentation show.
PICTURES = os.environ.get("HARKEN_PICTURES")
PATIENCE = 20.0


def row_of(page, peer):
    """The row of a connection."""
    return page.locator("#connections tbody tr", has_text=peer)


def take_picture(page, name, tmp_path):
    """Take a picture of the page, for the documentation if that is asked for; return its path."""
    path = Path(PICTURES or tmp_path) / f"{name}.png"
    path.write_bytes(page.screenshot(animations="disabled"))
    return path


def closed(client):
    """Tell whether the server has ended a connection."""
    client.settimeout(PATIENCE)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_connection_appears_is_closed_and_goes(visit, service):
    """With its peer and bytes; closed by the token it leaves the table, and its client reads the end."""
    page = visit()
    client, peer = service.connect(b"x" * 100)
    row = row_of(page, peer)
    row.wait_for()
    assert "100 B" in row.inner_text()
    button = row.get_by_role("button", name=f"Close the connection of {peer}")
    assert button.is_disabled()
    page.get_by_label("Token").fill(service.token)
    button.click()
    page.get_by_text(f"Closed the connection of {peer}.").wait_for()
    row.wait_for(state="detached")
    assert closed(client)
    assert page.problems == []


def test_a_connection_is_traced(visit, service, tmp_path):
    """What it receives and sends is shown as it moves, as text that runs nothing, until somebody stops it."""
    page = visit()
    client, peer = service.connect()
    page.get_by_label("Token").fill(service.token)
    row_of(page, peer).get_by_role("button", name=f"Trace the connection of {peer}").click()
    page.get_by_role("heading", name=f"Trace of {peer}").wait_for()
    page.get_by_text("following").wait_for()
    client.sendall(b"<b>hi</b>\n")
    for direction in ("in", "out"):
        line = page.locator(f"#moved li.{direction}")
        line.wait_for()
        assert line.inner_text().endswith(r"<b>hi</b>\n")
    assert client.recv(100) == b"<b>hi</b>\n"
    take_picture(page, "live-view-trace", tmp_path)
    page.get_by_role("button", name="Stop").click()
    assert page.locator("#trace").is_hidden()
    row_of(page, peer).get_by_role("button", name=f"Trace the connection of {peer}").click()
    page.locator("#moved").get_by_text("following").wait_for()
    client.close()
    page.get_by_text("the connection has ended: peer_closed").wait_for()
    assert page.problems == []


def test_a_wrong_token_closes_nothing(visit, service):
    """The view says so, and the connection goes on."""
    page = visit()
    client, peer = service.connect()
    page.get_by_label("Token").fill("f" * 20)
    row_of(page, peer).get_by_text("Close").click()
    page.get_by_text("The token is wrong.").wait_for()
    client.sendall(b"still here\n")
    assert client.recv(100) == b"still here\n"


def test_keys_alone_do_it_all(visit, service):
    """Tab reaches filter, token, headings and buttons in the order of reading; Enter sorts and closes."""
    page = visit()
    (_, one), (client, two) = service.connect(), service.connect(b"x" * 1000)
    row_of(page, two).wait_for()
    page.keyboard.press("Tab")
    assert focused(page) == "Go to the connections"
    page.keyboard.press("Tab")
    page.keyboard.type(two)
    row_of(page, one).wait_for(state="detached")
    page.keyboard.press("Tab")
    page.keyboard.type(service.token)
    names = []
    for _ in range(20):
        page.keyboard.press("Tab")
        names.append(focused(page))
        if names[-1] == "In":
            page.keyboard.press("Enter")
        if names[-1] == "Close":
            break
    assert names == ["Peer", "Id", "Age", "Idle", "In", "Out", "Waits for", "Process", "Trace", "Close"]
    assert page.locator("th[aria-sort]").inner_text().startswith("In")
    assert outline(page) != "none"
    page.keyboard.press("Enter")
    page.get_by_text(f"Closed the connection of {two}.").wait_for()
    row_of(page, two).wait_for(state="detached")
    assert closed(client)
    assert page.evaluate("document.activeElement.id") == "filter"  # and is not lost with the row


def focused(page):
    """The text of what has the keyboard's focus."""
    return page.evaluate("document.activeElement.textContent")


def outline(page):
    """How what has the focus is marked."""
    return page.evaluate("getComputedStyle(document.activeElement).outlineStyle")


def test_the_table_sorts_and_filters(visit, service):
    """By bytes, most first and least first; the heading says which, and the filter how many are left."""
    page = visit()
    peers = [service.connect(b"x" * size)[1] for size in (10, 1000, 100)]
    for peer in peers:
        row_of(page, peer).wait_for()
    heading = page.locator("#connections").get_by_role("columnheader", name=re.compile("^In"))
    for way, expected in (("descending", [1000, 100, 10]), ("ascending", [10, 100, 1000])):
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == way
        shown = page.locator("#connections tbody tr td[data-name=In]").all_inner_texts()
        assert [int(re.match(r"\d+", text)[0]) for text in shown] == expected
    page.get_by_label("Filter by peer or id").fill(peers[0])
    page.get_by_text("1 shown of 3 that are open.").wait_for()


def test_figures_workers_limits_and_stalls_are_there(visit, service):
    """Open connections, both workers, a limit with its unit; and where a handler kept the others waiting."""
    page = visit()
    for _ in range(3):
        service.connect()
    service.connect(b"stall\n")
    page.locator(".tile", has_text="Open now").get_by_text("4", exact=True).wait_for()
    page.locator("#stalls").get_by_text(re.compile(r"app\.py:7$")).wait_for()
    assert page.locator("#workers tbody tr").count() == 2
    assert "connections" in page.locator("#limits tr", has_text="max_connections").first.inner_text()


def test_what_a_peer_says_is_text(visit, service, tmp_path):
    """A client whose path is a piece of HTML is shown by it, and nothing of it runs."""
    page = visit()
    # Looked at in the same breath: the next word from the server shows the page anew.
    shown = page.evaluate(
        """() => { const each = structuredClone(seen.connections[0] ?? {
             id: "<img src=x onerror=document.title='hit'>", seconds: 1, idle_seconds: 1, bytes_in: 1, bytes_out: 1,
             waits_for: "<script>document.title='hit'</script>", process: 1,
             peer: {address: "<img src=x onerror=document.title='hit'>", port: 0, credentials: null}});
           show({...seen, connections: [each]});
           const count = (selector) => document.querySelectorAll("#connections " + selector).length;
           return {rows: count("tbody tr"), alive: count("img") + count("script"),
                   text: document.querySelector("#connections tbody").innerText}; }"""
    )
    assert (shown["rows"], shown["alive"]) == (1, 0)
    assert "<img src=x" in shown["text"]
    assert page.title() == "harken"


def test_the_view_says_when_the_server_is_gone(visit, service, run_program):
    """It does not go on to show what was."""
    page = visit()
    page.route("**/events", lambda route: route.abort())
    page.evaluate("void follow()")
    page.get_by_text("the server does not answer").wait_for()


def test_the_view_says_when_nobody_has_news(visit, service):
    """The page is there, and who knows does not answer it."""
    page = visit()
    page.locator(".tile", has_text="Open now").get_by_text("0", exact=True).wait_for()
    shown = page.evaluate("show({error: 'no news'}); [by('health').textContent, by('health').className]")
    assert shown == ["no news", "bad"]


def test_silence_is_told_as_well(visit, service):
    """A network that has gone tells of no end; the view asks anew."""
    page = visit()
    page.route("**/events", lambda route: None)  # never answered
    page.evaluate("void follow()")
    page.evaluate("void (heard -= SILENCE)")
    page.get_by_text("the server does not answer").wait_for()
    page.unroute("**/events")
    page.evaluate("void (heard -= SILENCE)")
    page.get_by_text("ready", exact=True).first.wait_for()


def test_figures_of_another_server_are_not_compared(visit, service):
    """After one that has gone the history begins anew, and so do rates and latencies."""
    page = visit()
    page.locator(".tile", has_text="Opened/s").get_by_text("0.0", exact=True).wait_for()
    page.route("**/events", lambda route: route.abort())
    page.evaluate("void follow()")
    page.get_by_text("the server does not answer").wait_for()
    assert page.evaluate("history.length") == 0


@pytest.mark.parametrize(
    "name, options",
    [
        ("live-view", {"color_scheme": "light"}),
        ("live-view-dark", {"color_scheme": "dark"}),
        ("live-view-phone", {"width": 390, "height": 800, "is_mobile": True, "has_touch": True}),
    ],
)
def test_pictures(visit, service, tmp_path, name, options):
    """Light, dark and on a phone: readable, nothing wider than the screen, and a picture of it."""
    page = visit(**options)
    for _ in range(100 if PICTURES else 0):  # so that the small drawings have something to show
        client, _ = service.connect(random.randbytes(random.randint(1, 900)))
        client.close()
        page.wait_for_timeout(100)
    for size in (40, 5000, 120000):
        client, peer = service.connect(b"x" * min(size, 1000))
        for _ in range(size // 1000):
            client.sendall(b"x" * 1000)
            received = 0
            while received < 1000:
                received += len(client.recv(1000))
    service.connect(b"stall\n")
    page.locator("#stalls").get_by_text(re.compile(r"app\.py")).first.wait_for()  # on a busy machine more than one
    row_of(page, peer).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert contrast(page, "body") >= 4.5  # WCAG 2.2, 1.4.3
    assert contrast(page, ".faint") >= 4.5
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (luminance(background) < 0.2) == (options.get("color_scheme") == "dark")
    assert take_picture(page, name, tmp_path).stat().st_size < 150_000


def luminance(color):
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(page, selector):
    """The contrast of an element's text against the page."""
    color = page.evaluate("(it) => getComputedStyle(document.querySelector(it)).color", selector)
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    dark, light = sorted((luminance(color), luminance(ground)))
    return (light + 0.05) / (dark + 0.05)


def test_no_motion_for_those_who_want_none(visit, service):
    """A new row is not animated where the system asks for reduced motion."""
    page = visit(reduced_motion="reduce")
    _, peer = service.connect()
    row = row_of(page, peer)
    row.wait_for()
    assert row.evaluate("(it) => getComputedStyle(it).animationName") == "none"
