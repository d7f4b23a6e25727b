"""One self-contained HTML page that tells whether a run is healthy: verdict, previews, curves, histograms, cost.

    python -m distill.report runs/digits-amd                   # writes runs/digits-amd/report.html
    python -m distill.report runs/digits-amd --out page.html

It reads what the run has written so far (log.jsonl, previews, recipe.yaml), so it may be made while the run goes on.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import yaml
from PIL import Image

from distill.telemetry import svg
from distill.telemetry.health import Finding, Rule, Verdict, judge
from distill.telemetry.record import Record, ReportError, Series, load

PREVIEWS = 10
"""Pictures of previews in a page, evenly spaced, the last among them."""
WORDS = {"healthy": "healthy", "watch": "watch", "bad": "bad", "unknown": "not judged"}
MARKS = {"healthy": "✓", "watch": "!", "bad": "✕", "unknown": "?"}

CHARTS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Forbidden zone", "Shares of the probe's samples: where the teacher is lost, where the fake score's pull is flat, "
     "and both at once. Dashed: the thresholds of the zone itself.",
     (("lost", "zone/lost"), ("flat", "zone/flat"), ("in the zone", "zone/share"))),
    ("Escapes", "What became of the samples of the probe before: shares that left the zone, that entered it, and of "
     "low rewards that rose above their old bar.",
     (("left", "zone/escaped"), ("entered", "zone/entered"), ("low reward rose", "zone/reward_escaped"))),
    ("Residuals", "Teacher's denoising residual over that of its own samples, and the fake score's over the teacher's.",
     (("teacher, own samples = 1", "probe/residual"), ("fake, teacher = 1", "probe/fake_residual"))),
    ("Diversity", "Distance between samples of a prompt: the probe's over the teacher's; and in training, in latents.",
     (("probe, teacher = 1", "probe/diversity"), ("training", "diversity"))),
    ("Reward", "The training reward: of training samples, of the probe, and of the teacher's own samples.",
     (("training", "reward"), ("probe", "probe/reward"), ("teacher", "probe/teacher/reward"))),
    ("Gap of rewards", "Lead of the training reward's progress over the held-out ones', in standard deviations.",
     (("gap", "reward_gap"),)),
    ("Preference and competence", "Rank correlation, within prompts, of the reward and the teacher's certainty: the "
     "assumption that AMD rests on. Near 1 a good score means that the teacher knows the picture.",
     (("correlation", "probe/alignment"),)),
    ("Displacements", "Lengths of matching (DM) and of conditional alignment (CA) in latents.",
     (("‖DM‖", "dm_norm"), ("‖CA‖", "ca_norm"), ("normaliser", "normaliser"), ("deviation of x", "x_std"))),
    ("Angle", "Cosine of DM and CA; below 0 matching works against guidance.", (("cos(DM, CA)", "dm_ca_cos"),)),
    ("Gradient norms", "Before clipping, per role.",
     (("student", "student/grad_norm"), ("fake", "fake/grad_norm"), ("discriminator", "discriminator/grad_norm"))),
    ("Losses", "They say little: a student's loss may rise while its pictures improve.",
     (("student", "student/loss"), ("fake", "fake/loss"), ("discriminator", "discriminator/loss"))),
    ("Weights", "Effective sample size of W, share of advantages beyond the clip, trust that safeguards leave.",
     (("ESS of W", "w_ess"), ("clipped", "advantage_clipped"), ("trust", "trust"))),
)  # fmt: skip
HISTOGRAMS = (
    ("ã", "advantage"), ("α", "alpha"), ("β", "beta"), ("ω per sample", "omega"), ("W", "w"),
)  # fmt: skip
LIMITS = {"zone/share": (0.1, 0.3), "reward_gap": (0.5, 1.5), "w_ess": (0.5, 0.25), "probe/diversity": (0.7, 0.5)}

STYLE = (
    """
:root{--ground:#fff;--ink:#1b2027;--soft:#5c6672;--line:#dde2e8;--card:#f6f8fa;--healthy:#1f7a45;--watch:#a06000;
--bad:#b3261e;--unknown:#6b7480;--c0:#2f6bd0;--c1:#c2571a;--c2:#2a8a57;--c3:#8a4bb8;--c4:#b23a6a;--c5:#5f6b7a}
@media(prefers-color-scheme:dark){:root{--ground:#14171c;--ink:#e8ebef;--soft:#a2abb6;--line:#333b45;--card:#1c2128;
--healthy:#5fc98c;--watch:#e5b04c;--bad:#ff8a80;--unknown:#9aa4b0;--c0:#7aa7ff;--c1:#f0965c;--c2:#6fce9a;--c3:#c495ee;
--c4:#ee86ae;--c5:#a2abb6}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:16px;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.2rem;margin:2em 0 .6em}h3{font-size:1rem;margin:0}
p{margin:.3em 0}.soft,figcaption{color:var(--soft);font-size:.875rem}
.verdict{border-left:6px solid;padding:8px 14px;font-size:1.2rem;font-weight:600;background:var(--card)}
.healthy{color:var(--healthy)}.watch{color:var(--watch)}.bad{color:var(--bad)}.unknown{color:var(--unknown)}
.verdict span{color:var(--ink)}
.cards{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));margin-top:12px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px;margin:0}
.card b{font-weight:600}.card .mark{float:right;font-weight:600}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif;fill:var(--soft)}
svg .grid{stroke:var(--line)}svg polyline{fill:none;stroke-width:1.6}
svg .watch,svg .bad{stroke:var(--watch);stroke-dasharray:4 3}svg .bad{stroke:var(--bad)}
"""
    + "".join(
        f"svg .c{i}{{stroke:var(--c{i})}}svg circle.c{i}{{fill:var(--c{i});stroke:none}}"
        f".legend .c{i}{{color:var(--c{i})}}\n"
        for i in range(svg.COLOURS)
    )
    + """.legend{font-size:.875rem;margin:0 0 4px}.legend>span{margin-right:12px;white-space:nowrap}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:4px 8px;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
.shots{grid-template-columns:repeat(auto-fill,minmax(min(46%,220px),1fr))}
figure img{width:100%;image-rendering:pixelated;display:block}pre{font-size:.8rem;overflow-x:auto}
"""
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m distill.report",
        description="Write one HTML page that tells whether a run is healthy.",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # keeps the example on one line
        epilog="example: python -m distill.report runs/digits-amd",
    )
    parser.add_argument("run", type=Path, help="the folder of a run, such as runs/digits-amd")
    parser.add_argument("--out", type=Path, help="default: report.html in that folder")
    options = parser.parse_args(arguments)
    try:
        record = load(options.run)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 2
    verdict = judge(record)
    target = options.out or options.run / "report.html"
    target.write_text(page(record, verdict))
    print(f"{record.name}: {verdict.headline}")
    print(f"wrote {target}")
    return 0


def page(record: Record, verdict: Verdict) -> str:
    """The whole document, verdict first; nothing in it is loaded from elsewhere."""
    sections = (
        ("Rules", cards(verdict.findings)),
        ("Previews over time", previews(record)),
        ("Curves", curves(record)),
        ("Histograms over time", histograms(record)),
        ("Cost", cost(record)),
        (
            "Recipe",
            f"<details><summary>as resolved</summary><pre>{escape(yaml.safe_dump(record.recipe))}</pre></details>",
        ),
    )
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(record.name)}: {escape(verdict.headline)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{escape(record.name)}</h1><p class='soft'>{escape(progress(record))}</p>"
        f'<p class="verdict {verdict.level}">{MARKS[verdict.level]} <span>{escape(verdict.headline)}</span></p>'
        f"</header><main>{body}</main></body></html>\n"
    )


def progress(record: Record) -> str:
    planned = record.recipe.get("iterations")
    seconds = record.total("seconds")
    took = f", {seconds / 60:.0f} minutes" if seconds else ""
    return f"{record.iterations} of {planned or '?'} iterations{took}"


def cards(findings: Iterable[Finding]) -> str:
    return f'<div class="cards">{"".join(card(finding) for finding in findings)}</div>'


def card(finding: Finding) -> str:
    rule, level = finding.rule, finding.level
    if finding.value is None:
        told = f"<p class='soft'>{escape(rule.missing)}</p>"
    else:
        since = f" since iteration {finding.since}" if finding.since else ""
        told = f"<p><b>{quantity(finding.value, rule)}</b>{since} <span class='soft'>({limits(rule)})</span></p>"
        told += f"<p class='soft'>{escape(rule.reason)}</p>"
        told += f"<p>{escape(rule.remedy)}</p>" if level in ("watch", "bad") else ""
    return (
        f'<article class="card"><span class="mark {level}">{MARKS[level]} {WORDS[level]}</span>'
        f"<h3>{escape(rule.title)}</h3>{told}</article>"
    )


def quantity(value: float, rule: Rule) -> str:
    return f"{svg.number(value)} {rule.unit}".strip()


def limits(rule: Rule) -> str:
    word = "above" if rule.rising else "below"
    return f"watch {word} {quantity(rule.watch, rule)}, bad {word} {quantity(rule.bad, rule)}"


def curves(record: Record) -> str:
    charts = [(title, note, [(label, record.series(name)) for label, name in lines]) for title, note, lines in CHARTS]
    marks = {title: [m for _, name in lines for m in _limits(name)] for title, _, lines in CHARTS}
    heldout = [(name.removeprefix("heldout/"), record.series(name)) for name in record.names("heldout/")]
    charts.append(("Held-out rewards", "Nothing trains on them.", heldout))
    bins = [(name.removeprefix("fake_error/t"), record.series(name)) for name in record.names("fake_error/t")]
    bins.sort()
    charts.append(("Fake score's error by noise level", "Bins of the time axis; 1 is pure noise.", bins))
    return _figures(chart(title, note, lines, marks.get(title, []), _span(record)) for title, note, lines in charts)


def chart(
    title: str,
    note: str,
    lines: Sequence[tuple[str, Series]],
    marks: Sequence[tuple[float, str]],
    span: tuple[int, int],
) -> str:
    drawn = svg.lines(lines, limits=marks, span=span)
    legend = "".join(
        f'<span><span class="c{i % svg.COLOURS}">●</span> {escape(label)} {svg.number(series.y[-1])}</span>'
        for i, (label, series) in enumerate(lines)
        if len(series)
    )
    return _figure(title, note, f'<p class="legend">{legend}</p>{drawn}') if drawn else ""


def histograms(record: Record) -> str:
    return _figures(
        _figure(title, "", svg.heat(found, title, span=_span(record)))
        for title, name in HISTOGRAMS
        if (found := record.histograms(name))
    )


def previews(record: Record) -> str:
    """Some previews, evenly spaced: the same prompts and seeds with the averaged weights, a row per number of steps."""
    found = record.previews
    chosen = [found[round(i)] for i in _spread(len(found), PREVIEWS)]
    return _figures(
        (
            f'<figure><img alt="previews at iteration {n}" src="{data_uri(path)}">'
            f"<figcaption>iteration {n}</figcaption></figure>"
            for n, path in chosen
        ),
        "cards shots",
    )


def data_uri(path: Path, largest: int = 60_000) -> str:
    """A picture as a data URI: as it is where it is small, else as WebP, which pixels survive at quality 85."""
    content, kind = path.read_bytes(), "png"
    if len(content) > largest:
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "WEBP", quality=85)
        content, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def cost(record: Record) -> str:
    """Rows of forward passes and seconds per role, a GPU's where the log has them; a guided teacher counts twice."""
    unit = "GPU" if record.names("gpu_seconds") else "CPU"
    key = f"{unit.lower()}_seconds"
    roles = list(dict.fromkeys(name.split("/", 1)[1] for p in ("forwards/", f"{key}/") for name in record.names(p)))
    if not roles:
        return ""
    whole = record.total(key)
    rows = [(role, record.total(f"forwards/{role}"), record.total(f"{key}/{role}")) for role in roles]
    rest = whole - sum(seconds for _, _, seconds in rows)
    rows.append(("previews, checkpoints, logs", 0.0, max(rest, 0.0)))
    lines = "".join(
        f"<tr><td>{escape(role)}</td><td>{_some(forwards)}</td><td>{_some(forwards / record.iterations)}</td>"
        f"<td>{_some(seconds)}</td><td>{f'{seconds / whole:.1%}' if seconds and whole else ''}</td></tr>"
        for role, forwards, seconds in rows
    )
    note = (
        f"Samples that passed forward through each network (a guided teacher counts twice), and {unit}-seconds of each "
        "role's phase: the student's holds rollout, reward and the passes of the teacher; the first probe also draws "
        f"the teacher's own samples. Whole run: {_some(whole)} {unit}-seconds in {_some(record.total('seconds'))} "
        "seconds."
    )
    head = f"<tr><th>role</th><th>samples forward</th><th>per iteration</th><th>{unit}-seconds</th><th>share</th></tr>"
    return f'<div class="scroll"><table>{head}{lines}</table></div><p class="soft">{note}</p>'


def _span(record: Record) -> tuple[int, int]:
    return int(record.lines[0]["iteration"]), record.iterations


def _limits(name: str) -> list[tuple[float, str]]:
    return list(zip(LIMITS[name], ("watch", "bad"), strict=True)) if name in LIMITS else []


def _spread(count: int, most: int) -> list[float]:
    """At most ``most`` positions of ``count``, evenly spaced, both ends among them."""
    n = min(count, most)
    return [i * (count - 1) / (n - 1) for i in range(n)] if n > 1 else [0.0] * n


def _figure(title: str, note: str, content: str) -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{content}{caption}</figure>"


def _figures(figures: Iterable[str], kind: str = "cards") -> str:
    found = [figure for figure in figures if figure]
    return f'<div class="{kind}">{"".join(found)}</div>' if found else ""


def _some(value: float) -> str:
    return svg.number(value) if value else ""


if __name__ == "__main__":
    sys.exit(main())
