"""Pictures: they are drawn, whole, of what was planned, and without side effects."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import eplb_rs
import numpy as np
import pytest
from eplb_rs.loads import read_loads
from eplb_rs.report import Report
from recordings import deepseek_r1_report

pytest.importorskip("matplotlib", reason="draws")
from eplb_rs import draw


@pytest.fixture(scope="module")
def report():
    return deepseek_r1_report()


def test_heat_maps_show_loads_over_their_layer_mean(report):
    before, after, imbalance = draw.figure(report).axes[:3]
    for axis, plan in ((before, report.before), (after, report.plan)):
        want = plan.rank_load / plan.rank_load.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(axis.images[0].get_array(), want)
        assert f"{plan.balance:.4f}" in axis.get_title(loc="left")
    # One scale of colours, so that the two can be compared; 1 is in its middle.
    norms = [axis.images[0].norm for axis in (before, after)]
    assert [(norm.vmin, norm.vcenter, norm.vmax) for norm in norms] == [(0.0, 1.0, 3.0)] * 2
    labels = [label.get_text() for label in before.get_yticklabels()]
    assert labels[:2] == ["3", "7"]
    dots = imbalance.collections[-1].get_offsets()
    np.testing.assert_allclose(dots[:, 0], report.plan.layer_imbalance)


def test_png(report, tmp_path):
    draw.save(report, tmp_path / "plan.PNG")
    content = (tmp_path / "plan.PNG").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert 1000 <= width <= 4000
    assert 500 <= height <= 4000


def test_svg(report, tmp_path):
    draw.save(report, tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    root = ET.fromstring(text)
    assert root.tag.endswith("svg")
    # Namespaces and licences aside, nothing is fetched.
    links = re.findall(r'(?:href|src)="([^"]{5})', text)
    assert links
    assert all(link.startswith(("#", "data:", "http:")) for link in links)
    assert not re.search(r"<image[^>]*http", text)


class Page(HTMLParser):
    """Collects tags that are open, resources and the cells of tables."""

    VOID = ("meta", "img", "source")

    def __init__(self, text):
        super().__init__()
        self.open, self.resources, self.cells = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.resources += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_page(report, tmp_path):
    draw.save(report, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert len(page.resources) == 2  # light and dark
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.resources)
    assert "<script" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    for want in ("0.2266", "0.7947", "68.53 M", "220"):
        assert want in page.cells
    assert page.cells.count("57") >= 1
    assert len(text) < 1_000_000


@pytest.mark.skipif(os.name != "posix", reason="no such names elsewhere")
def test_page_escapes_what_comes_from_outside(tmp_path):
    name = "<img src=x onerror=alert(1)>$\\frac{.npy"
    np.save(tmp_path / name, [[1.0, 2.0, 3.0, 4.0]])
    trace = read_loads(tmp_path / name)
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 2, 2)).plan(trace.total)
    text = draw.page(Report(plan=plan, trace=trace))
    assert "<img src=x" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;" in text


@pytest.mark.parametrize(
    ("layers", "experts", "topology"),
    [
        (1, 1, (1, 1, 1)),
        (1, 4, (2, 1, 3)),
        (3, 64, (1, 8, 9)),
        (94, 128, (20, 8, 1)),
        (200, 512, (50, 8, 2)),
        (2, 2000, (1, 1500, 2)),
    ],
)
def test_any_shape(layers, experts, topology, tmp_path):
    load = np.random.default_rng(0).lognormal(0, 1, (layers, experts))
    plan = eplb_rs.Planner(eplb_rs.Topology(*topology)).plan(load)
    draw.save(Report(plan=plan), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_zero_load_is_drawn_as_even():
    plan = eplb_rs.Planner(eplb_rs.Topology(1, 2, 3)).plan(np.zeros((2, 4)))
    report = Report(plan=plan)
    assert "1.0000" in Page(draw.page(report)).cells
    for axis in draw.figure(report).axes[:2]:
        assert (axis.images[0].get_array() == 1.0).all()


def test_matplotlib_is_left_as_it_was(tmp_path):
    code = f"""
import sys, matplotlib
def settings():
    # Asking for the backend in the usual way would choose one.
    return {{name: dict.__getitem__(matplotlib.rcParams, name) for name in matplotlib.rcParams}}
before = settings()
import eplb_rs
from eplb_rs import draw
from eplb_rs.report import Report
plan = eplb_rs.Planner(eplb_rs.Topology(1, 2, 3)).plan([[1, 2, 3, 4]])
draw.save(Report(plan=plan), {str(tmp_path / "a.html")!r})
draw.save(Report(plan=plan), {str(tmp_path / "a.png")!r})
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_matplotlib_is_missing(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (
        lambda: draw.save(report, tmp_path / "a.png"),
        lambda: draw.figure(report),
        lambda: draw.page(report),
    ):
        with pytest.raises(eplb_rs.InvalidInputError) as caught:
            call()
        assert caught.value.code == "missing_dependency"
        assert caught.value.hint == "pip install 'eplb-rs[plot]'"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.jpg", "a", ".png", "a.pdf", "a.html.gz"])
def test_other_formats_are_refused(report, tmp_path, name):
    with pytest.raises(eplb_rs.InvalidInputError) as caught:
        draw.save(report, tmp_path / name)
    assert caught.value.code == "unknown_format"
    assert not list(tmp_path.iterdir())


def test_file_that_cannot_be_written(report, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "none" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(eplb_rs.InvalidInputError) as caught:
            draw.save(report, path)
        assert caught.value.code == "unwritable_file"


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_nothing_is_left_beside_the_picture(report, tmp_path):
    (tmp_path / "plan.svg").write_text("old")
    (tmp_path / "plan.svg").chmod(0o640)
    (tmp_path / "link.svg").symlink_to(tmp_path / "plan.svg")
    draw.save(report, tmp_path / "link.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.svg", "plan.svg"]
    assert (tmp_path / "link.svg").is_symlink()
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    assert (tmp_path / "plan.svg").stat().st_mode & 0o777 == 0o640
