"""The three forms: text that fits and is plain, a Mermaid class diagram, a well-formed picture."""

from __future__ import annotations

import http.server
import re
import socketserver
import xml.etree.ElementTree as ET

import pytest

import harken
from harken.explain import describe, render_mermaid, render_svg, render_text, trace

SVG = "{http://www.w3.org/2000/svg}"
LIBRARY = [
    socketserver.BaseServer,
    socketserver.ThreadingTCPServer,
    socketserver.ForkingUnixStreamServer
    if hasattr(socketserver, "ForkingUnixStreamServer")
    else socketserver.UDPServer,
    http.server.ThreadingHTTPServer,
    http.server.SimpleHTTPRequestHandler,
    harken.ThreadingTCPServer,
    harken.PoolTCPServer,
]


def wide(count: int) -> type:
    """Make a server class with many bases, of which two share an ancestor and one is named twice."""
    root = type("Root", (), {"__module__": "app", "a_method_with_quite_a_long_name_of_its_own": lambda self: None})
    mixins = [type(f"Mixin{number}", (root,) if number % 2 else (), {"__module__": "app"}) for number in range(count)]
    return type("Wide", (*mixins, root, socketserver.TCPServer), {"__module__": "app"})


@pytest.mark.parametrize("cls", [*LIBRARY, wide(2), wide(4), wide(9)])
def test_text_fits_and_draws_every_class(cls: type) -> None:
    """No line is over 100 columns, boxes are closed, every class has its box."""
    explanation = describe(cls)
    text = render_text(explanation)
    assert max(map(len, text.splitlines())) <= 100
    drawing = text[: text.index("Hooks, in call order")]
    boxes = sum(len(family.classes) for family in explanation.families)
    for corner in "┌┐└┘":
        assert drawing.count(corner) >= boxes
    for family in explanation.families:
        for box in family.classes:
            assert f" {box.name} " in drawing


def test_small_drawing() -> None:
    """Lines join the boxes: ancestors above, the mix-in on its side."""
    first = type("Early", (), {"__module__": "app", "setup": lambda self: None})
    cls = type("Mine", (first, socketserver.BaseRequestHandler), {"__module__": "app"})
    text = render_text(describe(socketserver.TCPServer, cls))
    drawing = text[text.index("The handler's classes") : text.index("Hooks")]
    assert "┬" in drawing
    assert "┴" in drawing
    early, basis, mine = (drawing.index(f" {name} ") for name in ("Early", "BaseRequestHandler", "Mine"))
    assert early < mine
    assert basis < mine
    column = {name: drawing[: drawing.index(f" {name} ")].rpartition("\n")[2] for name in ("Early", "Mine")}
    assert len(column["Early"]) < len(column["Mine"])


def test_long_names_are_broken_not_cut() -> None:
    """A class name that is wider than its box goes on in the next line."""
    name = "Extraordinarily" * 9
    drawing = render_text(describe(type(name, (socketserver.TCPServer,), {"__module__": "app"}))).partition("Hooks")[0]
    assert max(map(len, drawing.splitlines())) <= 100
    assert name in re.sub(r"[^a-zA-Z]", "", drawing)


def test_text_is_plain_unless_coloured(program) -> None:
    """Escape sequences appear only when asked for."""
    explanation = describe(program.Misspelt)
    assert "\x1b" not in render_text(explanation)
    assert "\x1b[" in render_text(explanation, colour=True)


def test_text_shows_the_users_hook_and_the_warning(program, find_line) -> None:
    """A row has hook, class, file:line and thread; the warning stands below."""
    text = render_text(describe(program.Careful))
    assert re.search(rf"● +verify_request +Careful +app.py:{find_line('class Careful') + 1} +serving thread", text)
    assert "warning: Misspelt.verify_requests" in render_text(describe(program.Misspelt))


def test_text_of_a_trace(program) -> None:
    """The calls are indented as they were nested, with times and threads."""
    text = render_text(describe(program.Careful), trace(program.Careful, program.Upper))
    assert "client sent b'hello\\r\\n' and got b'HELLO\\r\\n'" in text
    assert re.search(r"^ +\d+\.\d\d +\d+\.\d\d {14}handle +Upper +Thread-\d+$", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("cls", [*LIBRARY, wide(4)])
def test_mermaid_names_every_class(cls: type) -> None:
    """A class diagram with a node for each class and an arrow for each base."""
    explanation = describe(cls)
    lines = render_mermaid(explanation).splitlines()
    assert lines[0] == "classDiagram"
    classes = [box for family in explanation.families for box in family.classes]
    declared = [match[1] for line in lines if (match := re.match(r" +class (\w+)", line))]
    assert sorted(declared) == sorted(box.name for box in classes)
    assert sum("<|--" in line for line in lines) == sum(len(box.bases) for box in classes)


def test_mermaid_lines_are_of_its_grammar() -> None:
    """Nothing but declarations, members, arrows and comments; no word that Markdown would make bold."""
    known = re.compile(r'classDiagram|class \w+(\["\w+"\])?( \{)?|\}|[\w\\]+\(\)|\w+ <\|-- \w+|%% .*|')
    explanation = describe(harken.PoolTCPServer, http.server.SimpleHTTPRequestHandler)
    for line in render_mermaid(explanation, trace(harken.PoolTCPServer)).splitlines():
        assert known.fullmatch(line.strip())
        assert line.strip().startswith("%%") or "__" not in line


def test_mermaid_tells_namesakes_apart() -> None:
    """Two classes of one name are two nodes."""
    cls = type("Web", (harken.ThreadingMixIn, http.server.ThreadingHTTPServer), {"__module__": "app"})
    text = render_mermaid(describe(cls))
    assert 'class ThreadingMixIn_["ThreadingMixIn"]' in text
    assert re.search(r"ThreadingMixIn_? <\|-- Web", text)


@pytest.mark.parametrize("cls", [*LIBRARY, wide(9)])
def test_svg_is_a_picture_of_every_class(cls: type) -> None:
    """The picture is XML, has a box with each class's name, and nothing of it lies outside."""
    explanation = describe(cls)
    picture = ET.fromstring(render_svg(explanation))
    assert picture.tag == f"{SVG}svg"
    words = [text.text for text in picture.iter(f"{SVG}text")]
    boxes = [shape for shape in picture.iter(f"{SVG}rect") if shape.get("class", "").startswith("box")]
    assert len(boxes) == sum(len(family.classes) for family in explanation.families)
    assert {box.name for family in explanation.families for box in family.classes} <= set(words)
    width, height = float(picture.get("width")), float(picture.get("height"))
    for box in boxes:
        assert float(box.get("x")) >= 0
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height


def test_svg_boxes_do_not_overlap() -> None:
    """Boxes of a wide hierarchy stand clear of each other."""
    picture = ET.fromstring(render_svg(describe(wide(9))))
    boxes = [
        [float(shape.get(key)) for key in ("x", "y", "width", "height")]
        for shape in picture.iter(f"{SVG}rect")
        if shape.get("class", "").startswith("box")
    ]
    for number, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[number + 1 :]:
            assert x + w < x2 or x2 + w2 < x or y + h < y2 or y2 + h2 < y


def test_svg_escapes_what_a_peer_or_error_says() -> None:
    """Characters that XML cannot hold do not break the picture."""
    calls = trace(socketserver.TCPServer)
    calls[0].error = "ValueError: <&>\x00"
    assert "ValueError: <&>" in "".join(ET.fromstring(render_svg(describe(socketserver.TCPServer), calls)).itertext())
