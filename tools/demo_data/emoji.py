"""Emoji as several vendors draw them: iconify's SVG bodies, named and grouped by emojibase (Unicode CLDR)."""

import io
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from rich.progress import track

from demo_data.packages import read_npm_json
from demo_data.pictures import SIZE, Picture, readable, slug, thumbnail, to_webp

EMOJI_LICENSES = {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "fluent-emoji-flat": "MIT",
    "emojione": "CC-BY-4.0",
    "fxemoji": "Apache-2.0",
}


def icon_svg(icons: dict[str, Any], name: str) -> str:
    """The SVG of an icon of an iconify set, its aliases followed (an alias may mirror its parent)."""
    mirror = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        mirror ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    left, top = icon.get("left", 0), icon.get("top", 0)
    body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{icon["body"]}</g>' if mirror else icon["body"]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def icon_name(emoji: dict[str, Any], unicode_name: str, names: set[str], names_by_hexcode: dict[str, str]) -> str | None:
    """The vendor's icon of an emoji: by code point where the vendor lists them, else by its CLDR or Unicode name."""
    hexcode = emoji["hexcode"].lower()
    for code in (hexcode, hexcode.replace("-fe0f", ""), f"{hexcode}-fe0f"):
        if code in names_by_hexcode:
            return names_by_hexcode[code]
    candidates = [slug(emoji["label"]), slug(unicode_name)]
    candidates += [candidate.replace("-", "") for candidate in candidates]
    if emoji["label"].startswith("flag: "):
        country = slug(emoji["label"].removeprefix("flag: "))
        candidates += [f"flag-for-{country}", f"flag-for-flag-{country}"]
    return next((candidate for candidate in candidates if candidate in names), None)


def read_emoji(sources: Path) -> list[Picture]:
    """All vendors' drawings of the emoji that emojibase lists (skin tones are nested below those, hence left out)."""
    emojibase = [emoji for emoji in read_npm_json(sources, "emojibase", "en/data.json") if "group" in emoji]
    unicode_names = read_npm_json(sources, "emojibase", "meta/unicode-names.json")
    groups = read_npm_json(sources, "emojibase", "meta/groups.json")
    pictures = []
    for vendor, license_id in EMOJI_LICENSES.items():
        icons = read_npm_json(sources, f"iconify-json-{vendor}-", "icons.json")
        names_by_hexcode = read_npm_json(sources, f"iconify-json-{vendor}-", "chars.json")
        names = set(icons["icons"]) | set(icons.get("aliases", {}))
        for emoji in track(emojibase, f"draw {vendor}"):
            name = icon_name(emoji, unicode_names.get(emoji["hexcode"], ""), names, names_by_hexcode)
            if name is None:
                continue
            svg = icon_svg(icons, name)
            png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
            webp = to_webp(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
            pictures.append(
                Picture(
                    source=vendor,
                    license=license_id,
                    concept=slug(emoji["label"]),
                    name=emoji["label"],
                    keywords=", ".join(tag for tag in emoji.get("tags", []) if tag != emoji["label"]),
                    description="",
                    group=readable(groups["groups"][str(emoji["group"])], " and "),
                    subgroup=readable(groups["subgroups"][str(emoji["subgroup"])]),
                    path="",
                    webp=webp,
                    thumbnail=thumbnail(webp),
                )
            )
    return pictures
