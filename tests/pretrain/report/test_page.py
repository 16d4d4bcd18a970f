"""Pages of sections: escaped, and with tables whose narrow columns are never broken."""

from __future__ import annotations

from pretrain.report.page import Page, Section, Table, render_page


def test_only_prose_is_broken_into_lines() -> None:
    reason = "up to some hundred this is how pre-LN behaves, which trains"
    table = Table(["level", "number", "reason"], [["note", "4.5e-06", reason], ["fails", "1", "short"]])
    assert table.long == {2}
    page = render_page(Page("a title", "probe", ("good", "well"), sections=[Section("", tables=[table])]))
    assert f'<td>note</td><td>4.5e-06</td><td class="long">{reason}</td>' in page
    assert '<td>fails</td><td>1</td><td class="long">short</td>' in page
    assert "td { font-variant-numeric: tabular-nums; white-space: nowrap; }" in page
    assert "overflow-wrap: anywhere" not in page.partition("table {")[2].partition(".scroll")[0]


def test_texts_are_escaped() -> None:
    sections = [
        Section("<h>", ["<p>"], tables=[Table(["<th>"], [["<td>"]])], preformatted="<pre>", folded="<s>")
    ]
    page = render_page(
        Page("<title>", "<kind>", ("good", "<status>"), "<lead>", [("<dt>", "<dd>")], sections)
    )
    for name in ("h", "p", "th", "td", "pre", "s", "title", "kind", "status", "lead", "dt", "dd"):
        assert f"&lt;{name}&gt;" in page
