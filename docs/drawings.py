"""Draws the seven methods: ``python docs/drawings.py`` writes ``docs/methods/drawings/*.svg``.

One picture per method, 420 wide so that it can be read on a phone, on a white card so that it can
be read on a dark page. The same text comes out on every machine; a test says when files and script
differ.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent / 'methods' / 'drawings'
WIDTH = 420

INK = '#1f2933'
SOFT = '#616e7c'
LINE = '#9aa5b1'
# What stands for what in every drawing.
FEATURE = ('#d6e6fb', '#3b78c4')  # a feature map
LAYER = ('#eef1f4', '#7b8794')  # something computed as ever
METHOD = ('#ffe0b8', '#d9730d')  # what the method adds
TRAINING = ('#dff3e4', '#2f855a')  # in training alone
STOP = '#c53030'

Point = tuple[float, float]
Colours = tuple[str, str]


def number(value: float) -> str:
    """A coordinate with one digit at most, so that the files stay small and diff well."""
    # Adding 0 makes 0 of -0.
    return f'{round(value, 1) + 0:g}'


def path_of(points: Sequence[Point]) -> str:
    return 'M' + ' L'.join(f'{number(x)} {number(y)}' for x, y in points)


def spans(text: str) -> str:
    """``X_l`` and ``X_{12}`` with a lowered, smaller index."""
    made, lowered = '', False
    for part in re.split(r'(_\{[^}]*\}|_\w)', text):
        index = part.startswith('_') and len(part) > 1
        shift = 4 * (index - lowered)
        if part and shift:
            size = ' font-size="72%"' if index else ''
            made += f'<tspan dy="{shift}"{size}>{escape(part.strip("_{}"))}</tspan>'
        elif part:
            made += escape(part)
        lowered = index if part else lowered
    return made


class Drawing:
    """An SVG of boxes, arrows and stacks of feature maps.

    Args:
        height: in the unit of ``WIDTH``.
        title: what the picture shows, for those who do not see it.
    """

    def __init__(self, height: int, title: str) -> None:
        self.height = height
        self.title = title
        self.parts: list[str] = []
        # Where each text ends, for the test that nothing is cut.
        self.extents: list[tuple[str, float, float, float]] = []

    def add(self, element: str) -> None:
        self.parts.append(element)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 15,
        colour: str = INK,
        anchor: str = 'middle',
        bold: bool = False,
    ) -> None:
        """Lines of text; ``y`` is the middle of the first."""
        weight = ' font-weight="600"' if bold else ''
        for i, line in enumerate(text.split('\n')):
            # An estimate that is on the wide side for the fonts below.
            length = 0.56 * size * len(re.sub(r'[_{}]', '', line))
            left = x - length * {'start': 0, 'middle': 0.5, 'end': 1}[anchor]
            middle = y + i * size * 1.25
            self.extents.append((line, left, left + length, middle))
            self.add(
                f'<text x="{number(x)}" y="{number(middle + 0.35 * size)}" font-size="{size}" '
                f'fill="{colour}" text-anchor="{anchor}"{weight}>{spans(line)}</text>'
            )

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        text: str = '',
        colours: Colours = LAYER,
        *,
        size: int = 15,
        dashed: bool = False,
        bold: bool = False,
        radius: int = 6,
    ) -> None:
        fill, stroke = colours
        dashes = ' stroke-dasharray="5 4"' if dashed else ''
        self.add(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}" '
            f'rx="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="1.5"{dashes}/>'
        )
        if text:
            lines = text.count('\n')
            self.text(x + w / 2, y + h / 2 - lines * size * 0.625, text, size=size, bold=bold)

    def stack(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        colours: Colours = FEATURE,
        *,
        n: int = 3,
        text: str = '',
    ) -> None:
        """Feature maps behind each other; ``x, y, w, h`` is the front one."""
        fill, stroke = colours
        for i in reversed(range(n)):
            self.add(
                f'<rect x="{number(x + 4 * i)}" y="{number(y - 4 * i)}" width="{number(w)}" '
                f'height="{number(h)}" fill="{fill}" stroke="{stroke}" stroke-width="1.2"/>'
            )
        if text:
            self.text(x + w / 2, y + h / 2, text)

    def line(
        self,
        points: Sequence[Point],
        *,
        colour: str = INK,
        width: float = 1.6,
        dashed: bool = False,
        head: bool = True,
    ) -> None:
        """A line through ``points``, with an arrow's head at its end."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ''
        points = list(points)
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        if head:
            points[-1] = (x1 - 7 * dx, y1 - 7 * dy)
        self.add(
            f'<path d="{path_of(points)}" fill="none" stroke="{colour}" '
            f'stroke-width="{width}"{dashes}/>'
        )
        if head:
            tip = [
                (x1, y1),
                (x1 - 8 * dx - 4 * dy, y1 - 8 * dy + 4 * dx),
                (x1 - 8 * dx + 4 * dy, y1 - 8 * dy - 4 * dx),
            ]
            self.add(f'<path d="{path_of(tip)} Z" fill="{colour}"/>')

    def circle(
        self,
        x: float,
        y: float,
        r: float = 12,
        text: str = '',
        colours: Colours = ('#ffffff', INK),
        *,
        size: int = 15,
    ) -> None:
        fill, stroke = colours
        self.add(
            f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(r)}" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.5"/>'
        )
        if text:
            self.text(x, y, text, size=size)

    def stop(self, x: float, y: float) -> None:
        """Two bars across a line that goes right: no gradient passes."""
        for shift in (-3, 3):
            self.line(
                [(x + shift - 3, y + 9), (x + shift + 3, y - 9)],
                colour=STOP,
                width=2.5,
                head=False,
            )

    def stop_across(self, x: float, y: float) -> None:
        """The same across a line that goes down."""
        for shift in (-3, 3):
            self.line(
                [(x - 9, y + shift + 3), (x + 9, y + shift - 3)],
                colour=STOP,
                width=2.5,
                head=False,
            )

    def bell(self, x: float, y: float, half: float, spread: float, colours: Colours) -> None:
        """The density of a normal distribution; ``y`` is its foot, ``half`` its half width."""
        peak = 9 / spread
        points = []
        for i in range(25):
            t = (i / 12 - 1) * half
            points.append((x + t, y - peak * math.exp(-0.5 * (t / (half * 0.42 * spread)) ** 2)))
        fill, stroke = colours
        self.add(f'<path d="{path_of(points)} Z" fill="{fill}" stroke="{stroke}"/>')

    def svg(self) -> str:
        title = escape(self.title)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'width="{WIDTH}" height="{self.height}" role="img" aria-label="{title}" '
            'font-family="Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">'
        )
        card = (
            f'<rect width="{WIDTH}" height="{self.height}" rx="10" fill="#ffffff" '
            'stroke="#d5dae0"/>'
        )
        return '\n'.join([head, f'<title>{title}</title>', card, *self.parts, '</svg>', ''])


def scale_equalizer() -> Drawing:
    d = Drawing(
        430,
        'Branches of different scale are each divided by their standard deviation before they '
        'are concatenated',
    )
    d.text(58, 22, 'branches', bold=True)
    d.text(158, 22, 'their scales', bold=True)
    d.text(302, 22, 'one scale', bold=True)
    d.text(384, 22, 'concat', bold=True)
    sides = [(54, 1.0, ''), (38, 0.62, 'enlarged ×2'), (24, 0.4, 'enlarged ×4')]
    for i, (side, spread, enlarged) in enumerate(sides):
        y = 78 + 80 * i
        d.stack(58 - side / 2 - 4, y - side / 2 + 4, side, side)
        d.line([(98, y), (116, y)])
        d.bell(158, y + 18, 38, spread, FEATURE)
        d.line([(118, y + 18), (198, y + 18)], colour=LINE, head=False)
        d.text(158, y + 30, enlarged, size=13, colour=SOFT)
        d.line([(198, y), (209, y)], head=False)
        d.circle(230, y, 21, f'÷ σ_{i + 1}', METHOD)
        d.line([(251, y), (264, y)])
        d.bell(302, y + 18, 38, 0.62, METHOD)
        d.line([(264, y + 18), (340, y + 18)], colour=LINE, head=False)
        d.line([(340, y), (370, y)])
        d.box(372, y - 40, 24, 80, colours=FEATURE, radius=0)
    d.line([(384, 278), (384, 312)])
    d.box(306, 314, 102, 40, 'fusion conv')
    d.line([(356, 354), (356, 388)])
    d.text(356, 402, 'classifier')
    d.box(12, 300, 266, 116, colours=METHOD, dashed=True)
    d.text(145, 320, 'The σ_i are measured once, before', size=14)
    d.text(145, 340, 'training. Folded into the initial', size=14)
    d.text(145, 360, 'weights they cost nothing:', size=14)
    d.text(145, 392, 'w_i  ←  w_i / σ_i', size=19, bold=True)
    d.line([(280, 334), (304, 334)], colour=METHOD[1], dashed=True)
    return d


def gff() -> Drawing:
    d = Drawing(
        560,
        'Every level takes the gated sum of all other levels, as far as its own gate lets it; a '
        'dense pyramid joins the fused levels',
    )
    d.text(20, 22, 'Gated fusion, shown for level 2', anchor='start', bold=True)
    rows = {1: 76, 2: 148, 3: 214, 4: 272}
    sides = {1: 52, 2: 42, 3: 34, 4: 26}
    for i, y in rows.items():
        side = sides[i]
        d.stack(48 - side / 2, y - side / 2, side, side, text=f'X_{i}')
        d.line([(86, y), (104, y)])
        d.circle(120, y, 15, f'G_{i}', METHOD, size=14)
    d.text(120, 44, 'gates', size=14, colour=METHOD[1])
    # What the others send.
    for i in (1, 3, 4):
        y = rows[i]
        d.line([(135, y), (190, y), (190, 182 if i > 1 else 134)], colour=METHOD[1], head=i != 4)
        d.text(164, y - 11, f'G_{i} X_{i}', size=13)
    d.circle(190, 158, 22, 'Σ', METHOD, size=19)
    d.line([(212, 158), (236, 158)], colour=METHOD[1])
    d.box(238, 141, 72, 34, '1 − G_2', METHOD)
    d.line([(310, 158), (328, 158)], colour=METHOD[1])
    d.circle(341, 158, 12, '+')
    d.line([(353, 158), (366, 158)])
    d.stack(368, 138, 38, 38, METHOD, text='X̃_2')
    # What level 2 keeps.
    d.line([(48, 118), (48, 108), (341, 108), (341, 145)])
    d.box(238, 90, 72, 34, '1 + G_2', METHOD)
    d.text(296, 206, 'takes from the others\nwhere its gate is closed', size=13, colour=SOFT)
    d.text(296, 54, 'keeps its own\nwhere its gate is open', size=13, colour=SOFT)
    d.line([(20, 306), (400, 306)], colour='#d5dae0', width=1, head=False)
    d.text(20, 328, 'Dense feature pyramid, from coarse to fine', anchor='start', bold=True)
    names = ['y_0', 'X̃_4', 'X̃_3', 'X̃_2', 'X̃_1']
    for i in range(1, 6):
        y = 352 + 34 * (i - 1)
        for j in range(i):
            d.box(20 + 42 * j, y, 38, 26, names[j], FEATURE if j == 0 else METHOD, radius=2)
        d.line([(20 + 42 * i + 2, y + 13), (244, y + 13)])
        d.box(246, y, 44, 26, f'H_{i}', size=14)
        d.line([(290, y + 13), (308, y + 13)])
        d.box(310, y, 34, 26, f'y_{i}', FEATURE, radius=2)
        d.line([(344, y + 13), (362, y + 13)])
    d.box(364, 352, 40, 162, radius=4)
    d.text(384, 400, 'con-\ncat', size=14)
    d.line([(384, 514), (384, 528)])
    d.text(404, 541, 'classifier', anchor='end')
    d.text(20, 541, 'y_0: context (pyramid pooling)', size=13, colour=SOFT, anchor='start')
    return d


TAPS = (
    '#7b1fa2', '#1976d2', '#00897b',
    '#c2185b', '#f57c00', '#689f38',
    '#d32f2f', '#5d4037', '#455a64',
)  # fmt: skip


def taps(d: Drawing, x: float, y: float, step: float, side: float) -> None:
    """The nine taps of a 3x3 kernel around a point, ``step`` apart."""
    for i, colour in enumerate(TAPS):
        row, column = divmod(i, 3)
        d.add(
            f'<rect x="{number(x + (column - 1) * step - side / 2)}" '
            f'y="{number(y + (row - 1) * step - side / 2)}" width="{number(side)}" '
            f'height="{number(side)}" fill="{colour}"/>'
        )


def ksac() -> Drawing:
    d = Drawing(
        480,
        'One 3x3 kernel is used at three dilation rates, each with a batch norm of its own, and '
        'the results are summed',
    )
    d.text(20, 40, 'one 3×3 kernel K', anchor='start', bold=True)
    d.text(20, 62, 'for all rates', anchor='start', size=14, colour=SOFT)
    d.box(176, 12, 68, 68, colours=('#ffffff', METHOD[1]))
    taps(d, 210, 46, 19, 17)
    d.text(258, 36, '(ASPP has one', anchor='start', size=14, colour=SOFT)
    d.text(258, 56, 'per rate)', anchor='start', size=14, colour=SOFT)
    for i, (rate, step) in enumerate([(6, 14), (12, 27), (18, 40)]):
        x = 76 + 134 * i
        d.line([(210, 80), (x, 112)], colour=METHOD[1])
        d.box(x - 54, 114, 108, 108, colours=FEATURE, radius=2)
        taps(d, x, 168, step, 11)
        d.text(x, 236, f'rate {rate}', size=14)
        d.line([(x, 248), (x, 262)])
        d.box(x - 54, 264, 108, 30, f'BN_{{{rate}}}, ReLU')
        d.line([(x, 294), (x, 310), (210, 310), (210, 318)] if i != 1 else [(x, 294), (x, 318)],
               head=i == 1)  # fmt: skip
    d.circle(210, 332, 13, '+', METHOD, size=18)
    d.line([(210, 345), (210, 372)])
    d.box(12, 344, 108, 30, '1×1 conv')
    d.box(300, 344, 108, 30, 'image level')
    d.line([(66, 374), (66, 391), (138, 391)])
    d.line([(354, 374), (354, 391), (282, 391)])
    d.box(140, 374, 140, 34, 'concat, 1×1 conv')
    d.line([(210, 408), (210, 428)])
    d.text(210, 440, 'classifier')
    d.text(210, 464, 'A further rate adds a batch norm and no kernel.', size=14, colour=SOFT)
    return d


def channel_bar(
    d: Drawing, x: float, y: float, shades: Sequence[float], colour: str, stroke: str
) -> None:
    """A vector of channels, standing; the shade is the value."""
    for i, shade in enumerate(shades):
        d.add(
            f'<rect x="{number(x)}" y="{number(y + 15 * i)}" width="18" height="15" '
            f'fill="{colour}" fill-opacity="{shade:.2f}" stroke="{stroke}"/>'
        )


def caa() -> Drawing:
    d = Drawing(
        500,
        'Column attention whose terms, one per key, have their channels gated before they are '
        'summed; the row pass follows',
    )
    # The map.
    d.text(20, 22, 'Column pass', anchor='start', bold=True)
    for row in range(5):
        for column in range(5):
            colours = FEATURE if column != 2 else ('#9cc2f2', FEATURE[1])
            d.box(20 + 24 * column, 40 + 24 * row, 24, 24, colours=colours, radius=0)
    d.box(68, 88, 24, 24, colours=(METHOD[1], INK), radius=0)
    d.text(80, 178, 'the pixel listens\nto its column', size=14, colour=SOFT)
    # The terms.
    d.text(276, 22, 'terms: attention × value', size=15)
    values = [
        (0.9, 0.3, 0.6, 0.2),
        (0.5, 0.8, 0.2, 0.4),
        (0.9, 0.6, 0.9, 0.3),
        (0.3, 0.4, 0.7, 0.8),
        (0.2, 0.7, 0.3, 0.5),
    ]
    d.line([(144, 100), (172, 100)])
    for i, shades in enumerate(values):
        channel_bar(d, 178 + 42 * i, 70, shades, FEATURE[1], FEATURE[1])
        d.text(187 + 42 * i, 50, f'α_{i + 1}', size=15)
    d.text(276, 146, 'one vector of channels per key', size=13, colour=SOFT)
    # The gate.
    gate = (0.95, 0.15, 0.75, 0.35)
    d.box(158, 164, 250, 96, colours=('#fff6ea', METHOD[1]), dashed=True)
    channel_bar(d, 178, 182, gate, METHOD[1], METHOD[1])
    d.text(
        304,
        182,
        's_i: a gate per channel,\nfor each row i of its own,\n'
        'made from the mean of\nall terms of that row',
        size=14,
    )
    # Before the sum.
    d.text(276, 276, 'each term × s_i, before the sum', size=15, bold=True)
    for i, shades in enumerate(values):
        gated = [a * g for a, g in zip(shades, gate)]
        channel_bar(d, 178 + 42 * i, 292, gated, METHOD[1], METHOD[1])
        if i:
            d.text(166 + 42 * i, 322, '+', size=17)
    d.line([(170, 322), (128, 322)])
    total = [sum(v[c] for v in values) / 3 * gate[c] for c in range(4)]
    channel_bar(d, 104, 292, [min(t, 1) for t in total], METHOD[1], INK)
    d.text(56, 322, 'pixel’s\nnew value', size=14)
    d.line([(20, 376), (400, 376)], colour='#d5dae0', width=1, head=False)
    d.text(20, 398, 'Row pass', anchor='start', bold=True)
    for column in range(5):
        colours = ('#9cc2f2', FEATURE[1]) if column != 2 else (METHOD[1], INK)
        d.box(110 + 24 * column, 386, 24, 24, colours=colours, radius=0)
    d.text(240, 398, 'the same along the row', anchor='start', size=14)
    d.box(20, 426, 380, 60, colours=METHOD, dashed=True)
    d.text(210, 444, 's_i is the same for all keys, so it leaves the sum:', size=14)
    d.text(210, 468, 'plain attention, then one product.', size=15, bold=True)
    return d


def cloud(d: Drawing, x: float, y: float, points: Sequence[Point], colours: Colours) -> None:
    for dx, dy in points:
        d.add(
            f'<circle cx="{number(x + dx)}" cy="{number(y + dy)}" r="4" fill="{colours[0]}" '
            f'stroke="{colours[1]}"/>'
        )


def car() -> Drawing:
    d = Drawing(
        590,
        'Three losses pull the features of a class to its centre and push centres and pixels of '
        'other classes away; at test nothing of it is left',
    )
    d.text(20, 22, 'In training: three losses on the features', anchor='start', bold=True)
    blue, red = ('#bcd8fb', '#1f5fa8'), ('#f9c6c6', '#b83232')
    ring = [(-52, -30), (-34, 34), (10, -48), (40, 42), (-66, 8), (-14, 58), (30, -22), (-28, -54)]
    d.add('<rect x="12" y="38" width="396" height="200" rx="8" fill="#fafbfc" stroke="#d5dae0"/>')
    cloud(d, 106, 138, ring, blue)
    cloud(d, 318, 138, [(-x, y) for x, y in ring], red)
    d.circle(106, 138, 13, 'μ_1', ('#ffffff', blue[1]))
    d.circle(318, 138, 13, 'μ_2', ('#ffffff', red[1]))
    # 1: pixel to its own centre. 2: centre from centre. 3: pixel from the other centre.
    d.line([(58, 111), (93, 130)], colour=TRAINING[1], width=2.2)
    d.line([(74, 170), (96, 148)], colour=TRAINING[1], width=2.2)
    d.circle(66, 134, 9, '1', TRAINING, size=13)
    d.line([(206, 138), (122, 138)], colour=METHOD[1], width=2.2)
    d.line([(218, 138), (302, 138)], colour=METHOD[1], width=2.2)
    d.circle(212, 138, 9, '2', ('#ffffff', METHOD[1]), size=13)
    d.line([(299, 150), (152, 178)], colour=STOP, width=1.4, dashed=True, head=False)
    d.line([(142, 181), (106, 196)], colour=STOP, width=2.2)
    d.circle(212, 176, 9, '3', ('#fde8e8', STOP), size=13)
    d.text(106, 226, 'pixels of class 1', size=13, colour=blue[1])
    d.text(318, 226, 'pixels of class 2', size=13, colour=red[1])
    lines = [
        (TRAINING, '1', 'intra c2p: a pixel to the centre of its class'),
        (('#ffffff', METHOD[1]), '2', 'inter c2c: centres away from each other'),
        (('#fde8e8', STOP), '3', 'inter c2p: a pixel away from other centres'),
    ]
    for i, (colours, sign, meaning) in enumerate(lines):
        y = 260 + 26 * i
        d.circle(28, y, 9, sign, colours, size=13)
        d.text(46, y, meaning, anchor='start', size=14)
    d.text(20, 352, 'Where they are taken', anchor='start', bold=True)
    d.box(12, 372, 86, 60, 'backbone\nand head', size=14)
    d.line([(98, 402), (114, 402)])
    d.box(116, 372, 80, 60, 'linear\n1×1', METHOD)
    d.line([(196, 402), (226, 402)])
    d.box(228, 372, 80, 60, 'project\n1×1', METHOD)
    d.line([(308, 402), (324, 402)])
    d.box(326, 372, 82, 60, 'classifier', size=14)
    d.line([(211, 402), (211, 452)], colour=TRAINING[1])
    d.box(112, 454, 198, 42, 'three losses, labels', TRAINING, dashed=True)
    d.text(20, 522, 'At test', anchor='start', bold=True)
    d.box(12, 540, 86, 38, 'as before', size=14)
    d.line([(98, 559), (114, 559)])
    d.box(116, 540, 192, 38, 'one 1×1, merged', METHOD)
    d.line([(308, 559), (324, 559)])
    d.box(326, 540, 82, 38, 'classifier', size=14)
    return d


def eseg() -> Drawing:
    d = Drawing(
        580,
        'Eight levels from stride 4 to 512, fused down and up, each enlarged to the finest one '
        'and summed with learned weights',
    )
    d.text(68, 22, 'levels', bold=True)
    d.text(222, 22, 'BiFPN, repeated', bold=True)
    d.text(366, 22, 'sum', bold=True)
    d.text(168, 44, 'down ↓', size=13, colour=METHOD[1])
    d.text(276, 44, 'up ↑', size=13, colour=METHOD[1])
    height = {level: 72 + 54 * (9 - level) for level in range(2, 10)}
    for level, y in height.items():
        width = 79 - 7 * (level - 2)
        d.box(108 - width, y - 15, width, 30, f'P_{level}', FEATURE if level < 6 else METHOD,
              size=14, radius=2)  # fmt: skip
        d.text(102 - width, y, f'/{2**level}', size=12, colour=SOFT, anchor='end')
        up, down = (276, y), (168, y)
        # P9 has no node on the way down, P2 none on the way up.
        if level == 9:
            d.line([(108, y), (264, y)])
            d.line([(168, y), (168, height[8] - 12)], colour=METHOD[1])
        else:
            d.line([(108, y), (156, y)])
            if level > 2:
                d.line([(179, y), (264, y)])
                # The level itself goes to the node on the way up as well.
                d.line([(132, y), (140, y - 20), (254, y - 20), (267, y - 9)], colour=LINE)
                d.line([(168, y + 11), (168, height[level - 1] - 12)], colour=METHOD[1])
            else:
                d.line([(179, y), (276, y), (276, height[3] + 12)], colour=METHOD[1])
            d.circle(*down, 11, colours=METHOD)
        if level > 2:
            d.circle(*up, 11, colours=METHOD)
            if level < 9:
                d.line([(276, y - 11), (276, height[level + 1] + 12)], colour=METHOD[1])
            d.line([(287, y), (340, y)], colour=LINE, dashed=True, head=False)
        else:
            d.line([(276, y), (354, y)])
    d.line([(340, height[9]), (340, 426), (356, 440)], colour=LINE, dashed=True)
    d.circle(370, height[2], 16, 'Σ', METHOD, size=18)
    d.text(374, 190, 'each level\nenlarged\nto P_2, with\na learned\nweight', size=13, colour=SOFT)
    d.line([(370, 466), (370, 490)])
    d.box(326, 492, 86, 44, '3×3 conv,\nclassifier', size=14)
    d.text(16, 496, 'blue: EfficientNet,\nstrides 4 to 32', anchor='start', size=13,
           colour=FEATURE[1])  # fmt: skip
    d.text(160, 496, 'orange: pooled on,\nstrides 64 to 512', anchor='start', size=13,
           colour=METHOD[1])  # fmt: skip
    d.text(210, 558, 'No kernel is dilated: the coarse levels see far.')
    return d


def hfgd() -> Drawing:
    d = Drawing(
        520,
        'The backbone’s last level is a teacher that trains the class tokens; the upsampler, a '
        'student, is classified by the same tokens and changes nothing before it',
    )
    d.box(12, 12, 396, 122, colours=('#f2faf4', TRAINING[1]), dashed=True)
    d.text(22, 30, 'Teacher, in training', anchor='start', bold=True, colour=TRAINING[1])
    for y, side, name in [(84, 26, 'C_5'), (226, 32, 'C_4'), (296, 40, 'C_3'), (378, 52, 'C_2')]:
        d.stack(44 - side / 2, y - side / 2, side, side)
        d.text(44, y, name, size=14)
    d.text(20, 172, 'backbone', anchor='start', size=14, colour=SOFT)
    # The teacher.
    d.line([(68, 84), (104, 84)])
    d.box(106, 60, 82, 48, 'encoder\n(CAE)', size=14)
    d.line([(188, 84), (212, 84)])
    d.stack(214, 72, 26, 26)
    d.line([(252, 84), (296, 84)])
    d.circle(310, 84, 13, '×', size=18)
    d.line([(323, 84), (340, 84)])
    d.box(342, 64, 58, 40, 'loss', TRAINING)
    # The tokens, for both.
    d.line([(310, 174), (310, 98)])
    d.box(226, 176, 168, 48, 'class tokens:\none 1×1 classifier', METHOD, size=14)
    d.line([(310, 224), (310, 362)])
    # The student.
    d.text(132, 252, 'Student', anchor='start', bold=True)
    for y, side in [(226, 32), (296, 40), (378, 52)]:
        d.line([(44 + side / 2 + 10, y), (112, y)], head=False)
        d.stop(96, y)
    d.line([(222, 98), (222, 152), (112, 152), (112, 378)], head=False)
    d.line([(112, 296), (128, 296)])
    d.box(130, 272, 100, 48, 'upsampler\n(U-SFPN)', size=14)
    d.line([(180, 320), (180, 350)])
    d.box(130, 352, 100, 48, 'axial\nattention', METHOD, size=14)
    d.line([(230, 376), (244, 376)])
    d.stack(246, 362, 28, 28)
    d.line([(284, 376), (296, 376)])
    d.circle(310, 376, 13, '×', size=18)
    d.line([(323, 376), (340, 376)])
    d.box(342, 356, 58, 40, 'loss', TRAINING)
    d.line([(310, 389), (310, 412)])
    d.box(256, 414, 108, 32, 'prediction')
    d.stop_across(112, 190)
    d.stop_across(310, 270)
    d.stop(32, 430)
    d.text(50, 430, 'no gradient passes back', anchor='start', colour=STOP, size=14)
    d.line([(20, 462), (400, 462)], colour='#d5dae0', width=1, head=False)
    d.text(210, 480, 'Backbone, encoder and tokens learn from the', size=14)
    d.text(210, 500, 'teacher alone; the student follows.', size=14)
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    'scale_equalizer': scale_equalizer,
    'gff': gff,
    'ksac': ksac,
    'caa': caa,
    'car': car,
    'eseg': eseg,
    'hfgd': hfgd,
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        path = FOLDER / f'{name}.svg'
        path.write_text(draw().svg(), encoding='utf-8')
        print(path)


if __name__ == '__main__':
    main()
