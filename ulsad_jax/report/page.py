"""Composes report.html: a whole run in one file that loads nothing from elsewhere."""

from __future__ import annotations

from html import escape
from string import Template

from ulsad_jax.report import sections
from ulsad_jax.report.content import RunFiles
from ulsad_jax.report.style import STYLE

MAX_PICTURES = 240  # in all categories together; about 4 MB at 256 x 256

# The policy forbids scripts and network access, in case a name contains HTML.
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$content
</body>
</html>
""")


def compose(run: RunFiles) -> str:
    """Returns the report of a run as an HTML page."""
    categories = run.categories
    limit = max(1, MAX_PICTURES // len(categories))
    links = "".join(
        f'<a href="#category-{k}">{escape(category.name)}</a> '
        for k, category in enumerate(categories)
    )
    parts = [
        sections.describe_protocol(run),
        sections.tabulate_results(run),
        f"<nav>{links}</nav>" if len(categories) > 1 else "",
        *(
            f'<section id="category-{k}"><h2>{escape(category.name)}</h2>'
            f"{sections.draw_category(category)}{sections.tabulate_scores(category)}"
            f"{sections.show_gallery(category, limit)}</section>"
            for k, category in enumerate(categories)
        ),
        sections.tabulate_stages(categories),
        sections.tabulate_all_metrics(run),
        sections.tabulate_config(run),
    ]
    return PAGE.substitute(
        title=escape(f"ULSAD: {run.name}"), style=STYLE, content="\n".join(parts)
    )
