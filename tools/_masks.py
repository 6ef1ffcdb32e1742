"""Images and masks in two folders: finds pairs, reads the masks, writes index PNGs.

The tools share this module; it is not a tool. A name without its extension is called a stem; the
stem of a file in a subfolder begins with the folder, ``city/000012``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import mmcv
import numpy as np
from mmengine.utils import track_iter_progress
from PIL import Image, UnidentifiedImageError

from mmseg_fusion.errors import InputError
from mmseg_fusion.images import fault

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
MASK_SUFFIXES = (*IMAGE_SUFFIXES, '.gif')
IGNORE = 255
#: An 8-bit mask has room for so many classes beside the ignored pixels.
MAX_CLASSES = 255
#: A mask in which more values occur is taken for a photograph, unless the classes are listed.
MAX_VALUES = 128
#: Names in a list of colours whose pixels are ignored.
IGNORED_NAMES = ('ignore', 'ignored', 'void', 'unlabelled', 'unlabeled')
#: How many members of a long list an error shows.
SHOWN = 5

Colour = tuple  # (red, green, blue), 0..255
Value = object  # what a pixel of a mask holds: an id, or a Colour


def some(members: Iterable, count: int = SHOWN) -> str:
    """The first few members, and how many more there are."""
    members = list(members)
    more = f' and {len(members) - count} more' if len(members) > count else ''
    return ', '.join(map(str, members[:count])) + more


def shown(value: Value) -> str:
    """A pixel's value in words: ``7``, or ``#800000 (128, 0, 0)``."""
    if isinstance(value, tuple):
        return '#{:02x}{:02x}{:02x} ({}, {}, {})'.format(*value, *value)
    return str(value)


# ------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pair:
    """An image and its mask.

    Attributes:
        name: of the image below its folder, without the suffix that all images have.
        image: file of the image.
        mask: file of the mask.
    """

    name: str
    image: Path
    mask: Path


@dataclass(frozen=True)
class Pairs:
    """All pairs of two folders.

    Attributes:
        pairs: by name.
        img_suffix: what follows a pair's name in the name of its image.
        seg_map_suffix: the same of its mask; None where the masks are named otherwise, so that
            MMSegmentation's data sets cannot find them by the name of the image.
        unmatched: files that belong to no pair.
    """

    pairs: tuple[Pair, ...]
    img_suffix: str
    seg_map_suffix: str | None
    unmatched: tuple[Path, ...]


def files_in(folder: Path, suffixes: Sequence[str], leave_out: Path) -> dict[str, Path]:
    """Stem and path of all images below a folder, without hidden files and those in ``leave_out``.

    Raises:
        InputError: two files have one stem.
    """
    paths: dict[str, Path] = {}
    for path in sorted(folder.rglob('*')):
        inside = path.relative_to(folder)
        if path.suffix.lower() not in suffixes or not path.is_file():
            continue
        if any(part.startswith('.') for part in inside.parts):
            continue
        if folder in leave_out.parents and leave_out in path.parents:
            continue
        stem = inside.with_suffix('').as_posix()
        if stem in paths:
            raise InputError(
                f'{paths[stem]} and {path} have the same name but for the suffix: which of them '
                'belongs to the other folder cannot be told; remove one'
            )
        paths[stem] = path
    return paths


@dataclass(frozen=True)
class _Affixes:
    """What surrounds the part of a name that image and mask have in common."""

    image: tuple[str, str] = ('', '')
    mask: tuple[str, str] = ('', '')

    def mask_of(self, stem: str) -> str | None:
        folder, _, name = stem.rpartition('/')
        before, after = self.image
        if not (name.startswith(before) and name.endswith(after)):
            return None
        if len(name) < len(before) + len(after):
            return None
        core = name[len(before) : len(name) - len(after)]
        name = self.mask[0] + core + self.mask[1]
        return f'{folder}/{name}' if folder else name

    def matches(self, images: Iterable[str], masks: Iterable[str]) -> dict[str, str]:
        masks = set(masks)
        expected = ((stem, self.mask_of(stem)) for stem in images)
        return {stem: mask for stem, mask in expected if mask in masks}


def _common(a: str, b: str) -> int:
    """How many characters two names begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _guesses(images: Sequence[str], masks: Sequence[str]) -> set[_Affixes]:
    """What may surround the common part: suffixes such as ``_mask``, or prefixes."""
    guesses = set()
    by_folder: dict[str, list[str]] = defaultdict(list)
    for mask in masks:
        by_folder[mask.rpartition('/')[0]].append(mask.rpartition('/')[2])
    samples = [images[i * (len(images) - 1) // 4] for i in range(5)]
    for sample in dict.fromkeys(samples):
        folder, _, name = sample.rpartition('/')
        for flip in (slice(None), slice(None, None, -1)):
            lengths = {mask: _common(name[flip], mask[flip]) for mask in by_folder[folder]}
            longest = max(lengths.values(), default=0)
            for mask, length in lengths.items():
                if length != longest or not longest:
                    continue
                ours, theirs = name[flip][length:][flip], mask[flip][length:][flip]
                pair = ((('', ours), ('', theirs)), ((ours, ''), (theirs, '')))
                guesses.add(_Affixes(*pair[flip.step == -1]))
    return guesses


def _best_match(images: dict[str, Path], masks: dict[str, Path]) -> tuple[_Affixes, dict[str, str]]:
    """Which mask belongs to which image, by name.

    Raises:
        InputError: several masks fit every image equally well.
    """
    plain = _Affixes()
    match = plain.matches(images, masks)
    if len(match) == len(images):
        return plain, match
    enough = min(len(images), len(masks)) / 2
    candidates = [(plain, match)]
    for guess in _guesses(list(images), list(masks)):
        match = guess.matches(images, masks)
        # A single pair that agrees by chance is no rule.
        if len(match) >= max(2, enough) or len(match) == len(images):
            candidates.append((guess, match))
    most = max(len(match) for _, match in candidates)
    best = [(affixes, match) for affixes, match in candidates if len(match) == most]
    if best[0][0] != plain and any(match != best[0][1] for _, match in best):
        endings = sorted({(affixes.mask[1] or affixes.mask[0]) for affixes, _ in best})
        raise InputError(
            f'several masks fit one image: their names differ in {", ".join(map(repr, endings))}. '
            'Say which with --mask-suffix, e.g. --mask-suffix ' + endings[0]
        )
    return best[0]


def find_pairs(
    images: Path, masks: Path, mask_suffix: str = '', only_matched: bool = False
) -> Pairs:
    """Finds which image and which mask belong together, by their names.

    Names are equal except for the file's suffix, and for an ending or a beginning that all images,
    or all masks, have in common (``a.jpg`` and ``a_mask.png``). Subfolders are the same in both
    folders; if all names differ, subfolders are ignored.

    Args:
        images: folder, with all folders in it.
        masks: the same.
        mask_suffix: masks are the files whose stem ends so; all others are no masks.
        only_matched: leave out files that belong to no pair, instead of raising an error.

    Raises:
        InputError: a folder is missing or empty, or files belong to no pair.
    """
    for what, folder in (('IMAGES', images), ('MASKS', masks)):
        if not folder.is_dir():
            kind = 'is a file' if folder.exists() else 'is no folder'
            raise InputError(f'{what} {str(folder)!r} {kind}; give the folder of the files')
    images, masks = images.resolve(), masks.resolve()
    if images == masks:
        raise InputError(
            f'IMAGES and MASKS are the same folder {str(images)!r}: give two, or put the masks '
            'into a folder in it'
        )
    of_images = files_in(images, IMAGE_SUFFIXES, masks)
    of_masks = files_in(masks, MASK_SUFFIXES, images)
    of_masks = {stem: path for stem, path in of_masks.items() if stem.endswith(mask_suffix)}
    for what, folder, paths, suffixes in (
        ('no image', images, of_images, IMAGE_SUFFIXES),
        ('no mask', masks, of_masks, MASK_SUFFIXES),
    ):
        if not paths:
            ending = f' whose name ends with {mask_suffix!r}' if paths is of_masks else ''
            raise InputError(
                f'{what} in {folder}: expected files in {", ".join(suffixes)}'
                + (ending if mask_suffix else '')
            )

    affixes, match = _best_match(of_images, of_masks)
    flat = False
    if not match:
        # The folders may be arranged unlike, where names alone tell the files apart.
        bare = [{PurePosixPath(s).name: s for s in stems} for stems in (of_images, of_masks)]
        if len(bare[0]) == len(of_images) and len(bare[1]) == len(of_masks):
            affixes, by_bare_name = _best_match(*bare)
            match = {bare[0][stem]: bare[1][mask] for stem, mask in by_bare_name.items()}
            flat = True
    lone_images = [path for stem, path in of_images.items() if stem not in match]
    lone_masks = [path for stem, path in of_masks.items() if stem not in set(match.values())]
    if not match or ((lone_images or lone_masks) and not only_matched):
        lines = [f'{len(match)} of {len(of_images)} images have a mask.']
        for what, lone, folder in (
            ('Images without a mask', lone_images, images),
            ('Masks without an image', lone_masks, masks),
        ):
            if lone:
                names = some(path.relative_to(folder).as_posix() for path in lone)
                lines.append(f'{what} ({len(lone)}): {names}.')
        lines.append(
            'Expected equal names but for the suffix, or one ending that all masks have (a.jpg '
            'and a_mask.png).'
        )
        if match:
            lines.append('--only-matched leaves out what belongs to no pair.')
        raise InputError('\n'.join(lines))

    suffixes = [{path.suffix for path in paths.values()} for paths in (of_images, of_masks)]
    one = len(suffixes[0]) == 1
    by_name = not flat and one and len(suffixes[1]) == 1 and affixes.image[0] == affixes.mask[0]
    # What image and mask have in common names the pair where the masks can stay where they are.
    img_suffix = (affixes.image[1] if by_name else '') + (suffixes[0].pop() if one else '')
    pairs = []
    for stem, mask in match.items():
        image = of_images[stem]
        inside = image.relative_to(images).as_posix()
        name = inside[: len(inside) - len(img_suffix)] if img_suffix else inside
        pairs.append(Pair(name, image, of_masks[mask]))
    return Pairs(
        tuple(pairs),
        img_suffix,
        affixes.mask[1] + suffixes[1].pop() if by_name else None,
        (*lone_images, *lone_masks),
    )


# --------------------------------------------------------------------------------------- colours


_TRIPLE = r'(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})'
_FORMS = (
    re.compile(r'^(?P<hex>#[0-9a-fA-F]{6})\b(?P<name>.*)$'),
    re.compile(rf'^{_TRIPLE}(?!\d)(?P<name>.*)$'),
    re.compile(r'^(?P<name>.+?)(?P<hex>#[0-9a-fA-F]{6})\b.*$'),
    # What follows a colon behind the colour belongs to the tool that wrote the list.
    re.compile(rf'^(?P<name>.+[\s,;:]){_TRIPLE}\s*(?::.*)?$'),
)


def read_colours(path: Path) -> dict[Colour, str]:
    """Reads a list of colours, a line per class: ``R G B name``, ``#rrggbb name``, ``name,R,G,B``.

    Args:
        path: of the list. Empty lines, a heading without a number and lines that begin with ``# ``
            are skipped.

    Returns:
        The name of every colour, in the order of the list.

    Raises:
        InputError: a line cannot be read, or a colour or name occurs twice.
    """
    try:
        lines = path.read_text(encoding='utf-8-sig').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f'--colors {path} cannot be read: {error}. Give a text file with a line R G B name for '
            'every class'
        ) from error
    names: dict[Colour, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or (line.startswith('#') and not _FORMS[0].match(line)):
            continue
        fields = next((m for m in (form.match(line) for form in _FORMS) if m), None)
        if fields is None and not names and not re.search(r'\d', line):
            continue
        where = f'{path}, line {number}'
        name = fields['name'].strip(' \t,;:"\'') if fields else ''
        if not name:
            raise InputError(
                f'{where}: expected R G B name, #rrggbb name or name,R,G,B, got {line!r}'
            )
        parts = fields.groupdict()
        if parts.get('hex'):
            colour = tuple(bytes.fromhex(parts['hex'][1:]))
        else:
            colour = tuple(int(v) for v in fields.groups() if v and v.isdigit())[:3]
        if max(colour) > 255:
            raise InputError(f'{where}: a colour is three numbers from 0 to 255, got {colour}')
        if colour in names or name in names.values():
            what = f'colour {shown(colour)}' if colour in names else f'name {name!r}'
            raise InputError(f'{where}: the {what} stands there twice')
        names[colour] = name
    if not names:
        raise InputError(f'{path} lists no colour; expected a line R G B name for every class')
    return names


# ----------------------------------------------------------------------------------------- masks


@dataclass
class MaskContent:
    """The content of one mask, and whether its image has the same size.

    Attributes:
        kind: ``'ids'``, ``'palette'`` (ids with colours) or ``'colours'``.
        values: pixels per id or colour.
        palette: of kind ``'palette'``, the colour of every id in ``values``.
        stored: whether the file holds 8-bit ids, as MMSegmentation reads them.
        size: width and height in pixels.
        problem: what is wrong with the pair; the rest is empty then.
    """

    kind: str = ''
    values: Counter = field(default_factory=Counter)
    palette: dict[int, Colour] = field(default_factory=dict)
    stored: bool = False
    size: tuple[int, int] = (0, 0)
    problem: str = ''


def open_mask(path: Path) -> Image.Image:
    """A mask as an image of mode L, P, I (ids) or RGB.

    Raises:
        ValueError: it cannot be read, or holds neither ids nor colours.
    """
    reason = fault(path)
    if reason is not None:
        raise ValueError(f'cannot be read as an image: {reason}')
    try:
        mask = Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError('cannot be read as an image') from error
    if 'A' in mask.getbands():
        clear = sum(mask.getchannel('A').histogram()[:255])
        if clear:
            raise ValueError(
                f'has {clear} pixels that are not opaque, whose class cannot be told; save it '
                'without an alpha channel'
            )
        mask = mask.convert({'LA': 'L', 'PA': 'P', 'RGBA': 'RGB'}.get(mask.mode, mask.mode))
    if mask.mode == '1':
        mask = mask.convert('L')
    elif mask.mode.startswith('I;16'):
        mask = mask.convert('I')
    elif mask.mode == 'F':
        numbers = np.asarray(mask)
        whole = np.isfinite(numbers) & (numbers == np.rint(numbers)) & (abs(numbers) < 2**31)
        if not whole.all():
            raise ValueError(
                f'has {np.count_nonzero(~whole)} pixels that are no whole numbers; expected ids or '
                'colours'
            )
        mask = Image.fromarray(numbers.astype(np.int32))
    if mask.mode not in ('L', 'P', 'I', 'RGB'):
        raise ValueError(f'is an image of mode {mask.mode}; expected ids (one channel) or RGB')
    return mask


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image, as training reads it.

    Raises:
        ValueError: it cannot be read.
    """
    reason = fault(path)
    if reason is not None:
        raise ValueError(f'cannot be read as an image: {reason}')
    try:
        with Image.open(path) as image:
            # Turned as its camera was held (EXIF), which the loading transform follows.
            return image.size[::-1] if image.getexif().get(0x0112, 1) > 4 else image.size
    except UnidentifiedImageError:
        # A format that Pillow does not know.
        image = mmcv.imread(str(path))
        if image is None:
            raise ValueError('cannot be read as an image') from None
        return image.shape[1::-1]


def read_mask(pair: Pair, by_colour: bool, listed: bool) -> MaskContent:
    """Counts the pixels of a mask.

    Args:
        pair: its image is read for the size alone.
        by_colour: whether colours count, also those of a palette or of grey.
        listed: whether the classes are known; if so, many values do not mean that it is a
            photograph.
    """
    content = MaskContent()
    path = pair.image
    try:
        content.size = width, height = image_size(path)
        path = pair.mask
        mask = open_mask(path)
        if mask.size != (width, height):
            raise ValueError(
                f'is {mask.size[0]} x {mask.size[1]} pixels, but its image {pair.image} is '
                f'{width} x {height}'
            )
        if by_colour and mask.mode == 'I':
            raise ValueError('holds 16- or 32-bit ids; expected colours, since there is --colors')
        with Image.open(path) as file:
            content.stored = file.mode in ('L', 'P')
        if by_colour:
            mask = mask.convert('RGB')
        most = 1 << 16
        colours = mask.getcolors(most)
        if colours is None or (len(colours) > MAX_VALUES and not listed):
            number = f'more than {most}' if colours is None else len(colours)
            what = 'colours' if mask.mode == 'RGB' else 'values'
            raise ValueError(
                f'holds {number} {what}: it is a photograph, or a mask whose colours were '
                'mixed by JPEG or by resizing. Give masks of one value per class'
                + ('' if listed else f'; above {MAX_VALUES} in one file list them with --colors')
            )
    except ValueError as error:
        content.problem = f'{path}: {error}'
        return content
    content.values = Counter({value: count for count, value in colours})
    content.kind = {'RGB': 'colours', 'P': 'palette'}.get(mask.mode, 'ids')
    if mask.mode == 'P':
        table = np.zeros((256, 3), np.uint8)
        palette = np.array(mask.getpalette() or [], np.uint8).reshape(-1, 3)
        table[: len(palette)] = palette[:256]
        content.palette = {i: tuple(int(v) for v in table[i]) for i in content.values}
    return content


def read_masks(pairs: Sequence[Pair], by_colour: bool, listed: bool) -> Iterator[MaskContent]:
    """:func:`read_mask` of all pairs, in their order; several at a time."""
    with ThreadPoolExecutor() as pool:
        contents = pool.map(lambda pair: read_mask(pair, by_colour, listed), pairs)
        yield from track_iter_progress((contents, len(pairs)))


def to_ids(path: Path, ids: dict[Value, int], by_colour: bool) -> np.ndarray:
    """A mask as an array of class ids.

    Args:
        path: of the mask.
        ids: class id, or the ignore index, of every value that occurs in it.
        by_colour: whether the values are colours.

    Shape:
        - returns: (H, W) uint8.
    """
    mask = open_mask(path)
    if by_colour:
        pixels = np.asarray(mask.convert('RGB')).astype(np.int32)
        codes = pixels @ (1 << 16, 1 << 8, 1)
        table = {(r << 16) + (g << 8) + b: i for (r, g, b), i in ids.items()}
    else:
        codes, table = np.asarray(mask).astype(np.int64), ids
        # A grey mask with three channels.
        codes = codes[..., 0] if codes.ndim == 3 else codes
    known = np.array(sorted(table), np.int64)
    places = np.searchsorted(known, codes)
    return np.array([table[int(code)] for code in known], np.uint8)[places]


def save_ids(ids: np.ndarray, palette: Sequence[Colour], path: Path) -> None:
    """Writes class ids as an index PNG, which a viewer shows in the colours of the classes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids)
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    image.putpalette(table.ravel().tolist())
    image.save(path)
