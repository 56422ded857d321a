"""The charts are XML, hold every point inside the frame, and higher values stand higher."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks.charts import HEIGHT, WIDTH, line_charts


@pytest.mark.parametrize("log", [False, True])
def test_line_charts(log):
    rising = {"a < b": [(1000, 1.0), (10000, 30.0), (100000, 400.0)], "flat": [(1000, 5.0)]}
    chart = {"title": "t", "x": "frames", "y": "s", "series": rising, "log": log}
    root = ET.fromstring(line_charts([chart, chart | {"series": {"one": [(3, 7.0), (9, 7.0)]}}]))
    lines = [x for x in root if x.tag.endswith("polyline")]
    assert len(lines) == 3
    points = [tuple(map(float, p.split(","))) for x in lines for p in x.get("points").split()]
    assert all(0 < x < 2 * WIDTH and 0 < y < HEIGHT for x, y in points)
    (x1, y1), (x2, y2), (x3, y3) = points[:3]
    assert x1 < x2 < x3 and y1 > y2 > y3
    texts = [x.text for x in root if x.tag.endswith("text")]
    assert "a < b" in texts and texts.count("frames") == 2
