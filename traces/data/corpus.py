"""Text of several domains from Python's standard library and ordinary Debian packages.

Documents are cleaned of markup, licence texts and repeated paragraphs, and split into training
and held-out documents before anything is trained.
"""

from __future__ import annotations

import gzip
import logging
import platform
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PYTHON_CODE = "code-python"
PYTHON_DOCS = "docs-english"
PACKAGES: dict[str, tuple[str, ...]] = {
    PYTHON_DOCS: ("python3.11-doc",),
    "man-english": ("manpages", "manpages-dev"),
    "man-german": ("manpages-de",),
    "man-french": ("manpages-fr",),
    "man-spanish": ("manpages-es",),
    "man-polish": ("manpages-pl",),
    "man-russian": ("manpages-ru",),
    "man-japanese": ("manpages-ja",),
}
LARGER_PACKAGES: dict[str, tuple[str, ...]] = {
    **PACKAGES,
    "man-chinese": ("manpages-zh",),
    "code-go": ("golang-1.19-src",),
    "code-rust": ("rust-src",),
    "code-cpp": ("libboost1.74-dev",),
}
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "encodings", "pydoc_data", "__pycache__"}
MIN_DOCUMENT_CHARS = 1200
MIN_REPEATED_CHARS = 24  # shorter paragraphs ("SYNOPSIS", "else:") repeat because text does

_LICENCE = re.compile(
    r"copyright|\blicen[cs]|©|\(c\) ?(19|20)\d\d|\bGPL|lizenz|licencia|лиценз|licencj"
    r"|all rights reserved|free software foundation|ライセンス|著作権",
    re.IGNORECASE,
)
_FONT = re.compile(r"\\f(?:\([A-Z]{2}|\[[A-Z]*\]|[A-Z0-9])|\\s[-+]?\d+|\\[&:/,|^%c]")
_NAMED_GLYPH = re.compile(r"\\\((..)|\\\[(\w+)\]")
_GLYPHS = {
    "aq": "'", "dq": '"', "em": "—", "en": "–", "bu": "•", "lq": "“", "rq": "”", "oq": "‘",
    "cq": "’", "ha": "^", "ti": "~", "rs": "\\", "mu": "×", "ga": "`", "ba": "|", "Fo": "«",
    "Fc": "»", "->": "→", "<=": "≤", ">=": "≥", "mi": "-",
}  # fmt: skip
_TEXT_REQUESTS = {"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SB", "SM", "SH", "SS"}
_BREAK_REQUESTS = {"PP", "P", "LP", "TP", "IP", "SH", "SS", "sp", "HP"}


@dataclass(frozen=True, slots=True)
class Document:
    """One cleaned text; name is unique within its domain."""

    domain: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training and held-out documents (disjoint), and the version of every source."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    sources: dict[str, str]


def gather(
    folder: Path,
    *,
    seed: int,
    domain_bytes: int,
    held_out_share: float,
    packages: Mapping[str, tuple[str, ...]] = PACKAGES,
) -> Corpus:
    """Fetch, clean, cap and split the corpus.

    folder          where packages are unpacked (kept; a second call finds them there)
    domain_bytes    most UTF-8 bytes kept of one domain, so that no domain rules the training
    held_out_share  share of each domain's documents that training never sees
    packages        Debian packages of each domain besides Python's standard library
    """
    sources = {"python": platform.python_version()}
    train: list[Document] = []
    held_out: list[Document] = []
    for domain in (PYTHON_CODE, *packages):
        roots = []
        for package in packages.get(domain, ()):
            root, sources[package] = fetch_package(package, folder)
            roots.append(root)
        documents = without_repeats(_documents(domain, roots))
        kept = _capped(documents, random.Random(f"{seed}:{domain}"), domain_bytes)
        n_held_out = max(2, round(held_out_share * len(kept)))
        held_out += kept[:n_held_out]
        train += kept[n_held_out:]
        log.info("%s: %d documents, %d held out", domain, len(kept), n_held_out)
    return Corpus(tuple(train), tuple(held_out), sources)


def fetch_package(package: str, folder: Path) -> tuple[Path, str]:
    """Download and unpack one Debian package; its folder and its version."""
    target = folder / package
    if not list(target.glob("*.deb")):
        target.mkdir(parents=True, exist_ok=True)
        download = ["apt-get", "download", package]
        subprocess.run(download, cwd=target, check=True, capture_output=True)
        (archive,) = target.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=target, check=True)
    (archive,) = target.glob("*.deb")
    field = ["dpkg-deb", "-f", str(archive), "Version"]
    return target, subprocess.run(field, check=True, capture_output=True, text=True).stdout.strip()


def plain_man_page(source: str) -> str:
    """Readable text of a man page's roff source; tables and macros are dropped."""
    source = re.sub(r"(?ms)^\.TS.*?^\.TE|^\.de.*?^\.\.$", "", source)
    lines = []
    for line in source.splitlines():
        if line[:1] not in (".", "'"):
            lines.append(_plain_inline(line))
            continue
        request, _, rest = line[1:].strip().partition(" ")
        if request in _BREAK_REQUESTS:
            lines.append("")
        if request in _TEXT_REQUESTS and rest:
            lines.append(_plain_arguments(request, rest))
    return "\n".join(lines)


def plain_rst(source: str) -> str:
    """A reStructuredText page without its comments, index entries and role names."""
    source = re.sub(r"(?m)^\.\. (?:index|sectionauthor|moduleauthor|_).*\n", "", source)
    return re.sub(r":[a-z]+(?::[a-z]+)?:`[!~]?([^`<]+?)(?: *<[^`]*>)?`", r"\1", source)


def without_repeats(documents: Iterator[Document]) -> list[Document]:
    """Documents without licence paragraphs and without paragraphs that an earlier one had."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", document.text):
            key = " ".join(paragraph.split())
            if not key or key in seen or _LICENCE.search(key):
                continue
            if len(key) >= MIN_REPEATED_CHARS:
                seen.add(key)
            paragraphs.append(paragraph.rstrip())
        text = "\n\n".join(paragraphs).strip("\n") + "\n"
        if len(text) >= MIN_DOCUMENT_CHARS:
            kept.append(Document(document.domain, document.name, text))
    return kept


def as_it_is(text: str) -> str:
    """The same text: source code has no markup to clean."""
    return text


_FILES: dict[str, tuple[str, Callable[[str], str]]] = {
    PYTHON_CODE: ("*.py", as_it_is),
    "code-go": ("*.go", as_it_is),
    "code-rust": ("*.rs", as_it_is),
    "code-cpp": ("*.hpp", as_it_is),
    PYTHON_DOCS: ("*.rst.txt", plain_rst),
}


def _documents(domain: str, roots: list[Path]) -> Iterator[Document]:
    pattern, clean = _FILES.get(domain, ("man/**/*.gz", plain_man_page))
    if domain == PYTHON_CODE:
        roots = [Path(sysconfig.get_paths()["stdlib"])]
    for root in roots:
        yield from _read(domain, root, pattern, clean)


def _read(domain: str, root: Path, pattern: str, clean: Callable[[str], str]) -> Iterator[Document]:
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(name.parts) or path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        yield Document(domain, name.as_posix(), clean(data.decode("utf-8", errors="replace")))


def _capped(documents: list[Document], rng: random.Random, n_bytes: int) -> list[Document]:
    rng.shuffle(documents)
    kept, total = [], 0
    for document in documents:
        total += len(document.text.encode())
        if total > n_bytes:
            break
        kept.append(document)
    return kept


def _plain_inline(line: str) -> str:
    line = _FONT.sub("", line)
    line = _NAMED_GLYPH.sub(lambda found: _GLYPHS.get(found[1] or found[2], ""), line)
    return line.replace("\\-", "-").replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " ")


def _plain_arguments(request: str, rest: str) -> str:
    words = re.findall(r'"((?:[^"]|"")*)"|(\S+)', rest)
    joint = "" if len(request) == 2 and set(request) <= set("BIR") else " "
    return _plain_inline(joint.join(quoted or bare for quoted, bare in words))
