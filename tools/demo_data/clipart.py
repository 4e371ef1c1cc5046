"""The public-domain works of Open Clip Art 0.18: PNG images, and titles and keywords from the RDF in their SVG."""

import io
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from rich.progress import track

from demo_data.packages import read_deb
from demo_data.pictures import Picture, readable, slug, thumbnail, to_webp

CLIPART = "openclipart"
CLIPART_LICENSE = "CC-PDDC"
"""SPDX identifier of the Creative Commons public domain dedication that Open Clip Art used."""
COLLECTION_SIZE = 8
"""A clip-art title shared by this many works names their collection, not the picture."""
# Keywords of Open Clip Art that are about the file or the collection and not about the picture.
NOISE_KEYWORD = re.compile(r"hash|[@.]|\d|^(unsorted|special|magick|openclipart|clip ?art|icons?|theme|\w+ theme icon)$")
VAGUE_TITLE = re.compile(r"part of the flat icon|hash|^untitled", re.IGNORECASE)
# Pictures of parametric series: 1,375 stars and 48 jigsaw pieces that no text tells apart.
SERIES = ("shapes/stars", "shapes/jigsaw")


class Work(NamedTuple):
    """What the RDF of a clip-art SVG says about it."""

    title: str
    description: str
    keywords: list[str]
    author: str
    is_public_domain: bool


def plain(text: str) -> str:
    """Text without markup, entities, hashes of a broken export, and underscores."""
    text = re.sub(r"<[^>]+>|&\w+;|HASH\(0x\w+\)", " ", text)
    return re.sub(r"[\s_]+", " ", text).strip(" .,-")


def read_rdf(svg: bytes) -> Work:
    # Regular expressions, since a good part of the files is not well-formed XML.
    rdf = re.search(r"<metadata.*?</metadata>", svg.decode(errors="replace"), re.S)
    text = rdf.group() if rdf else ""

    def first(pattern: str) -> str:
        found = re.search(pattern, text, re.S)
        return plain(found.group(1)) if found else ""

    return Work(
        title=re.sub(r"^clipart by .+? - ", "", first(r"<dc:title[^>]*>([^<]*)<"), flags=re.I),
        description=first(r"<dc:description[^>]*>(.*?)</dc:description>"),
        keywords=[plain(keyword).lower() for keyword in re.findall(r"<rdf:li[^>]*>([^<]*)</rdf:li>", text)],
        author=first(r"<dc:creator>.*?<dc:title[^>]*>([^<]*)<"),
        is_public_domain=bool(re.search(r'license[^>]*resource="[^"]*public-?domain', text, re.I)),
    )


def words_of_file_name(path: str, author: str) -> str:
    """`animals/lizard_guillaume_boitel_01` by Guillaume Boitel -> `lizard`."""
    author_words = set(re.findall(r"[a-z]+", author.lower()))
    # A number with a leading zero counts the author's uploads; others mean something (the nine of clubs).
    stem = re.sub(r"([a-z])([A-Z])", r"\1 \2", path.rsplit("/", 1)[-1])
    words = re.findall(r"[a-z]+|(?<!\d)[1-9]\d*", stem.lower())
    return " ".join(word for word in words if word not in author_words)


def clipart_name(path: str, work: Work, works_with_title: Counter[str]) -> str:
    title = work.title
    is_vague = works_with_title[title.lower()] >= COLLECTION_SIZE or VAGUE_TITLE.search(title)
    if is_vague or not re.search(r"[A-Za-z]{3}", title):
        title = words_of_file_name(path, work.author)
    return plain(title.replace("-", " ")) if re.search(r"[A-Za-z]{3}", title) else ""


def clipart_keywords(work: Work, name: str) -> str:
    said = set(re.findall(r"\w+", f"{name} {work.author}".lower()))
    keywords = [keyword for keyword in work.keywords if not NOISE_KEYWORD.search(keyword)]
    return ", ".join(dict.fromkeys(keyword for keyword in keywords if not set(keyword.split()) <= said))


def clipart_description(work: Work, name: str) -> str:
    description = work.description
    return "" if description.lower() in (name.lower(), work.title.lower()) else description


def read_clipart(sources: Path) -> list[Picture]:
    """The public-domain works of Open Clip Art without the parametric series and those that nothing names."""
    svg_archive, png_archive = (next(sources.glob(f"openclipart-{kind}_*.deb")) for kind in ("svg", "png"))
    works = {path: read_rdf(svg) for path, svg in read_deb(svg_archive, ".svg")}
    works_with_title = Counter(work.title.lower() for work in works.values())
    pictures = []
    for path, png in track(read_deb(png_archive, ".png"), "draw openclipart", total=len(works)):
        work = works.get(path)
        if work is None or not work.is_public_domain or path.startswith(SERIES):
            continue
        name = clipart_name(path, work, works_with_title)
        if not name:
            continue
        image = Image.open(io.BytesIO(png)).convert("RGBA")
        webp = to_webp(image.crop(image.getchannel("A").getbbox()))
        group, *subgroups = path.split("/")[:-1]
        pictures.append(
            Picture(
                source=CLIPART,
                license=CLIPART_LICENSE,
                concept=slug(name),
                name=name,
                keywords=clipart_keywords(work, name),
                description=clipart_description(work, name),
                group=readable(group),
                subgroup=readable(subgroups[0]) if subgroups else "",
                path=path,
                webp=webp,
                thumbnail=thumbnail(webp),
            )
        )
    return sorted(pictures, key=lambda picture: picture.path)
